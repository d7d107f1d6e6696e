// trace.json of whole runs: the schedules' tasks, spans that nest, bytes as the counters have them.
#include "tests/comm/testing.h"
#include "tests/train/meshes.h"
#include "tests/train/shared_run.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

namespace deltapipe {
namespace {

using nlohmann::json;
using testing::runtime;
using testing::SharedRun;

struct Span {
  int pid = 0, tid = 0;
  double begin = 0, end = 0;  // microseconds
  std::string category, name;
  std::int64_t step = 0;
  json arguments;
};

std::vector<Span> spans_of(const json& trace) {
  std::vector<Span> spans;
  for (const json& e : trace.at("traceEvents")) {
    if (e.at("ph") != "X") continue;
    const double begin = e.at("ts"), length = e.at("dur");
    EXPECT_GE(begin, 0.0);
    EXPECT_GE(length, 0.0);
    spans.push_back({e.at("pid"), e.at("tid"), begin, begin + length, e.at("cat"), e.at("name"),
                     e.at("args").at("step"), e.at("args")});
  }
  return spans;
}

constexpr double rounding_us = 0.002;  // times are written to the nanosecond

/// On the task track spans lie within each other or apart; on the communication track apart.
void expect_tidy_tracks(const std::vector<Span>& spans) {
  std::map<std::pair<int, int>, std::vector<Span>> open;
  for (const Span& s : spans) {  // a rank's spans are written in the order of their beginnings
    auto& stack = open[{s.pid, s.tid}];
    while (!stack.empty() && stack.back().end <= s.begin + rounding_us) stack.pop_back();
    if (!stack.empty()) {
      EXPECT_EQ(s.tid, 1) << s.name << " overlaps " << stack.back().name << " on rank " << s.pid;
      EXPECT_LE(s.end, stack.back().end + rounding_us) << s.name << " leaves " << stack.back().name;
      EXPECT_NE(stack.back().category, "task") << s.name << " within a task";
    }
    stack.push_back(s);
  }
}

using TaskKey = std::tuple<std::string, int, int, std::int64_t>;  // kind, microbatch, chunk, step of its data

std::string key_text(const TaskKey& k) {
  return fmt::format("{} {} chunk {} step {}", std::get<0>(k), std::get<1>(k), std::get<2>(k), std::get<3>(k));
}

/// Every task of every step once, and between the ends of a stage the schedule's list as it is.
void expect_schedule(const std::vector<Span>& spans, const TrainingPlan& plan) {
  for (int rank = 0; rank < plan.mesh.size(); ++rank) {
    std::map<TaskKey, int> seen, wanted;
    std::map<std::int64_t, std::vector<pipeline::Task>> lists;
    for (const Span& s : spans) {
      if (s.pid != rank || s.category != "task") continue;
      const std::string kind = s.arguments.at("kind");
      const int microbatch = s.arguments.at("microbatch"), chunk = s.arguments.at("chunk"),
                offset = s.arguments.at("step_offset");
      ++seen[{kind, microbatch, chunk, s.step + offset}];
      for (int k = 0; k < pipeline::task_kinds; ++k) {
        const auto candidate = static_cast<pipeline::TaskKind>(k);
        if (name_of(candidate) == kind) lists[s.step].push_back({candidate, microbatch, chunk, offset});
      }
    }
    std::int64_t step = 0;
    for (std::size_t i = 0; i < plan.config.stages.size(); ++i) {
      const pipeline::Schedule& schedule = plan.schedules[i];
      const auto& tasks = schedule.tasks[static_cast<std::size_t>(plan.mesh.coordinate_of(rank).pipeline)];
      const std::int64_t steps = stage_steps(plan.config.stages[i]);
      for (std::int64_t s = 1; s <= steps; ++s) {
        ++step;
        for (const pipeline::Task& t : tasks) {
          wanted[{std::string(name_of(t.kind)), t.microbatch, t.chunk, step}] = 1;
        }
        if (s == 1 || s == steps) continue;
        EXPECT_EQ(lists[step], tasks) << "rank " << rank << " step " << step;
      }
    }
    for (const auto& [key, count] : wanted) EXPECT_EQ(seen[key], count) << "rank " << rank << ": " << key_text(key);
    EXPECT_EQ(seen.size(), wanted.size()) << "rank " << rank;
  }
}

/// Of steps before and after which nothing was evaluated.
void expect_traffic(const std::vector<Span>& spans, const std::vector<json>& metrics, std::int64_t step) {
  std::map<std::pair<std::string, std::string>, std::pair<double, double>> traced, counted;
  for (const Span& s : spans) {
    if (s.category != "communication" || s.step != step || s.arguments.at("purpose") == "control") continue;
    auto& [messages, bytes] = traced[{s.arguments.at("axis"), s.arguments.at("purpose")}];
    messages += s.arguments.at("messages").get<double>();
    bytes += s.arguments.at("bytes").get<double>();
  }
  std::erase_if(traced, [](const auto& entry) { return entry.second.first == 0; });
  for (const json& m : metrics) {
    if (m.contains("eval") || m.contains("end") || m.at("step") != step || !m.contains("traffic")) continue;
    for (const auto& [axis, purposes] : m.at("traffic").items()) {
      for (const auto& [purpose, sent] : purposes.items()) {
        if (purpose != "control") counted[{axis, purpose}] = {sent.at("messages"), sent.at("bytes")};
      }
    }
  }
  EXPECT_EQ(traced, counted) << "step " << step;
}

/// Sums of gradients begin while the backward pass goes on, of every trained layer, embedding and head once; all have
/// ended before the gradients' norm is taken.
void expect_sums_behind_backward(const std::vector<Span>& spans, const TrainingPlan& plan, std::int64_t step,
                                 std::size_t stage) {
  const bool aligns = plan.objectives[stage].aligns_mixers();
  for (int rank = 0; rank < plan.mesh.size(); ++rank) {
    std::vector<Span> starts, waits;
    double last_end = 0, norm = 0;  // of the last task that adds to gradients; the beginning of what follows the sums
    for (const Span& s : spans) {
      if (s.pid != rank || s.step != step) continue;
      const bool is_forward = s.name.starts_with("teacher_forward") || s.name.starts_with("forward");
      if (s.category == "task" && !is_forward) last_end = std::max(last_end, s.end);
      if (s.name == "gradient norm") norm = s.begin;
      if (s.category != "communication" || s.arguments.at("purpose") != "gradients") continue;
      if (s.name.starts_with("start reduce_scatter_sum")) starts.push_back(s);
      if (s.name.starts_with("wait for reduce_scatter_sum")) waits.push_back(s);
    }
    std::size_t buckets = 0;
    for (const LayerRange& r : plan.ranges_of(plan.mesh.coordinate_of(rank).pipeline)) {
      buckets += static_cast<std::size_t>(r.size());
      if (aligns) continue;  // mixers and their norms alone
      buckets += (r.first == 0 ? 1 : 0) + (r.last == plan.student.layers() ? 1 : 0);
    }
    const bool alone = plan.mesh.data * plan.mesh.sequence == 1;
    EXPECT_EQ(starts.size(), alone ? 0 : buckets) << "step " << step << " rank " << rank;
    EXPECT_EQ(waits.size(), starts.size()) << "step " << step << " rank " << rank;
    for (const Span& s : starts) EXPECT_LT(s.end, last_end) << "step " << step << " rank " << rank;
    for (const Span& s : waits) EXPECT_LE(s.end, norm + rounding_us) << "step " << step << " rank " << rank;
  }
}

/// All ranks are in a step at one time: a step sums over the world.
void expect_one_clock(const std::vector<Span>& spans, std::int64_t step) {
  double latest_begin = 0, earliest_end = 1e300;
  for (const Span& s : spans) {
    if (s.category != "step" || s.step != step) continue;
    latest_begin = std::max(latest_begin, s.begin);
    earliest_end = std::min(earliest_end, s.end);
  }
  EXPECT_LT(latest_begin, earliest_end) << "step " << step;
}

TEST(Trace, ShowsWhatTheRanksDid) {
  const SharedRun shared;
  std::vector<std::vector<std::string>> meshes = testing::meshes_of(runtime().size());
  for (std::vector<std::string>& settings : meshes) {
    settings.push_back("trace.steps=[1, 6]");
    settings.push_back("checkpoint.every_steps=4");
    SCOPED_TRACE(fmt::format("{}", settings));
    const Config config = shared.config(settings);
    const TrainingPlan plan = shared.plan(config);
    shared.run(config);
    if (runtime().rank() != 0) continue;
    const json trace = shared.trace();
    const MeshShape& m = plan.mesh;
    EXPECT_EQ(trace.at("otherData").at("mesh"),
              (json{{"data", m.data}, {"pipeline", m.pipeline}, {"sequence", m.sequence}}));
    EXPECT_EQ(trace.at("otherData").at("dropped_events"), 0);
    const std::vector<Span> spans = spans_of(trace);
    expect_tidy_tracks(spans);
    expect_schedule(spans, plan);
    for (const std::int64_t step : {4, 5}) expect_traffic(spans, shared.metrics(), step);
    for (std::int64_t step = 1; step <= 6; ++step) {
      expect_one_clock(spans, step);
      expect_sums_behind_backward(spans, plan, step, step <= 2 ? 0 : 1);
    }
    std::map<std::string, std::map<int, int>> counts;  // name -> rank -> spans
    for (const Span& s : spans) ++counts[s.name][s.pid];
    for (const auto& [name, times] : {std::pair{"step", 6},
                                      {"load batch", 6},
                                      {"gradient sum", 6},
                                      {"update", 6},
                                      {"weight gather", 6},
                                      {"evaluation", 2},
                                      {"checkpoint snapshot", 2}}) {
      EXPECT_EQ(std::ssize(counts[name]), m.size()) << name;
      for (const auto& [rank, count] : counts[name]) EXPECT_EQ(count, times) << name << " of rank " << rank;
    }
    std::set<int> processes;
    for (const json& e : trace.at("traceEvents")) {
      if (e.at("name") == "process_name") processes.insert(e.at("pid").get<int>());
    }
    EXPECT_EQ(std::ssize(processes), m.size());
  }
}

TEST(Trace, NothingOutsideTheWindow) {
  const SharedRun shared;
  const Config config = shared.config({"mesh.data=0", "trace.steps=[2, 3]"});
  shared.run(config);
  if (runtime().rank() == 0) {
    std::set<std::int64_t> steps;
    for (const Span& s : spans_of(shared.trace())) steps.insert(s.step);
    EXPECT_EQ(steps, (std::set<std::int64_t>{2, 3}));
  }
  shared.run(shared.config({"mesh.data=0", "trace.steps=[7, 9]"}));
  if (runtime().rank() != 0) return;
  EXPECT_FALSE(shared.has_trace()) << "a window after the last step";
}

TEST(Trace, ARunThatEndsWithinTheWindowWritesWhatItHas) {
  const SharedRun shared;
  shared.run(shared.config({"mesh.data=0", "trace.steps=[5, 100]"}));
  if (runtime().rank() != 0) return;
  std::set<std::int64_t> steps;
  for (const Span& s : spans_of(shared.trace())) steps.insert(s.step);
  EXPECT_EQ(steps, (std::set<std::int64_t>{5, 6}));
}

}  // namespace
}  // namespace deltapipe
