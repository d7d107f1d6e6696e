// What a rank did in a step, out of recorded spans, against answers by hand.
#include "train/activity.h"

#include "core/error.h"

#include <gtest/gtest.h>

#include <vector>

namespace deltapipe {
namespace {

constexpr double second = 1e9;

struct Spans {
  std::vector<trace::Event> list;
  bool on_device = false;

  trace::Event& add(double begin, double end, const char* category, const char* name) {
    trace::Event e;
    e.category = category;
    e.name = name;
    e.step = 7;
    e.on_device = on_device;
    e.begin_ns = static_cast<std::int64_t>(begin * second);
    e.end_ns = static_cast<std::int64_t>(end * second);
    list.push_back(e);
    return list.back();
  }
  void message(double begin, double end, const char* axis, const char* lane = "") {
    trace::Event& e = add(begin, end, axis, "message");
    e.track = trace::Track::communication;
    e.lane = lane;
  }
  void host(double begin, double end, const char* category, trace::Track track = trace::Track::tasks) {
    trace::Event& e = add(begin, end, category, category);
    e.on_device = false;
    e.track = track;
  }
};

/// Step 7 from 10 s to 20 s.
TEST(Activity, OfACpuRank) {
  Spans s;
  s.add(8, 11, "task", "teacher_forward");  // its last second is within the step
  s.add(12, 15, "task", "forward");
  s.message(12.5, 13, "pipeline");
  s.message(12.75, 13.25, "sequence");  // overlaps: another rank's clock would not do this, but sums must hold
  s.add(15, 17, "task", "backward").chunk = 1;
  s.add(17, 17.5, "task", "backward").chunk = 1;
  s.add(18, 19, "optimizer", "update");
  s.message(18.5, 21, "world");
  s.add(10, 20, "step", "step");
  s.add(25, 26, "task", "forward");
  const Activity a = measure_activity(s.list, 7);
  EXPECT_DOUBLE_EQ(a.step_s, 10);
  // Work: 10-11, 12-12.5, 13.25-15, 15-17.5, 18-18.5.
  EXPECT_DOUBLE_EQ(a.idle_s, 10 - 6.25);
  EXPECT_DOUBLE_EQ(a.idle_share(), 0.375);
  EXPECT_DOUBLE_EQ(a.update_s, 0.5);
  EXPECT_DOUBLE_EQ(a.axes.at("pipeline").held_up_s, 0.5);
  EXPECT_DOUBLE_EQ(a.axes.at("world").held_up_s, 1.5);
  EXPECT_DOUBLE_EQ(a.all.held_up_s, 2.25);
  EXPECT_DOUBLE_EQ(a.all.messages_s, 2.25);
  EXPECT_DOUBLE_EQ(a.all.unhidden_s, 2.25);
  ASSERT_EQ(a.tasks.size(), 2u);
  EXPECT_DOUBLE_EQ(a.tasks.at({"forward", 0}).seconds, 2.25);
  EXPECT_EQ(a.tasks.at({"forward", 0}).count, 1);
  EXPECT_DOUBLE_EQ(a.tasks.at({"backward", 1}).seconds, 2.5);
  EXPECT_EQ(a.tasks.at({"backward", 1}).count, 2);
}

TEST(Activity, OfADevice) {
  Spans s;
  s.on_device = true;
  s.host(10, 20, "step");
  s.host(10, 19, "pipeline", trace::Track::communication);  // a call: the host's time holds nothing up
  s.add(11, 15, "task", "forward");
  s.message(11, 12, "pipeline");                    // the compute stream waits,
  s.message(9, 12, "pipeline", "pipeline, tag 0");  // for this
  s.message(13, 16, "sequence", "sequence");        // beside work until 15
  s.message(14, 17, "data_sequence", "data_sequence");
  s.add(18, 19, "optimizer", "update");
  const Activity a = measure_activity(s.list, 7);
  // Work: 12-15, 18-19.
  EXPECT_DOUBLE_EQ(a.idle_s, 6);
  EXPECT_DOUBLE_EQ(a.all.held_up_s, 1);
  EXPECT_DOUBLE_EQ(a.axes.at("pipeline").held_up_s, 1);
  EXPECT_DOUBLE_EQ(a.axes.at("pipeline").messages_s, 2);
  EXPECT_DOUBLE_EQ(a.axes.at("pipeline").unhidden_s, 2);
  EXPECT_DOUBLE_EQ(a.axes.at("sequence").messages_s, 3);
  EXPECT_DOUBLE_EQ(a.axes.at("sequence").unhidden_s, 1);
  EXPECT_DOUBLE_EQ(a.axes.at("sequence").held_up_s, 0);
  EXPECT_DOUBLE_EQ(a.axes.at("data_sequence").unhidden_s, 2);
  EXPECT_DOUBLE_EQ(a.all.messages_s, 2 + 4);
  EXPECT_DOUBLE_EQ(a.all.unhidden_s, 2 + 2);
  EXPECT_DOUBLE_EQ(a.tasks.at({"forward", 0}).seconds, 3);
  EXPECT_DOUBLE_EQ(a.update_s, 1);
}

TEST(Activity, NeedsTheStep) {
  Spans s;
  s.add(10, 20, "step", "step");
  EXPECT_THROW(measure_activity(s.list, 8), InternalError);
}

}  // namespace
}  // namespace deltapipe
