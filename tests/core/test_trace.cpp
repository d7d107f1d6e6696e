// The trace's buffer: nothing outside of a recording, and no more than there is room for.
#include "core/trace.h"

#include "core/error.h"

#include <gtest/gtest.h>

namespace deltapipe::trace {
namespace {

class Recorder : public ::testing::Test {
 protected:
  ~Recorder() override {
    stop();
    clear();
  }
};

TEST_F(Recorder, SpansOfARecordingAlone) {
  { const Span before("a", "before"); }
  reserve(10);
  { const Span reserved("a", "reserved"); }
  Span begun_before("a", "begun before");
  start();
  set_step(7);
  {
    const Span outer("a", "outer");
    Span inner("b", "inner");
    inner.end();
    inner.end();  // has ended already
  }
  begun_before.end();
  stop();
  { const Span after("a", "after"); }
  ASSERT_EQ(events().size(), 2u);
  const Event &inner = events()[0], &outer = events()[1];
  EXPECT_EQ(inner.name, "inner");
  EXPECT_EQ(inner.category, "b");
  EXPECT_EQ(outer.name, "outer");
  for (const Event& e : events()) {
    EXPECT_EQ(e.step, 7);
    EXPECT_EQ(e.track, Track::tasks);
  }
  EXPECT_LE(outer.begin_ns, inner.begin_ns);
  EXPECT_LE(inner.begin_ns, inner.end_ns);
  EXPECT_LE(inner.end_ns, outer.end_ns);
}

TEST_F(Recorder, CountsWhatFindsNoRoom) {
  reserve(3);
  start();
  const Event* memory = events().data();
  for (int i = 0; i < 5; ++i) {
    Event event;
    event.microbatch = i;
    record(event);
  }
  EXPECT_EQ(events().size(), 3u);
  EXPECT_EQ(events().back().microbatch, 2);
  EXPECT_EQ(events().data(), memory) << "the buffer has moved";
  EXPECT_EQ(dropped(), 2u);
  reserve(3);
  EXPECT_EQ(dropped(), 0u);
  EXPECT_TRUE(events().empty());
}

TEST_F(Recorder, NeedsRoom) {
  EXPECT_THROW(start(), InternalError);
  EXPECT_FALSE(is_on());
}

}  // namespace
}  // namespace deltapipe::trace
