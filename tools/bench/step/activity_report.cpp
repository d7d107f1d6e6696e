#include "tools/bench/step/activity_report.h"

#include "pipeline/simulator.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

namespace deltapipe::bench {
namespace {

using Json = nlohmann::ordered_json;
using pipeline::TaskKind;

template <class T>
Tensor bytes_of(T* data, std::size_t count) {
  return {data, DType::u8, {static_cast<std::int64_t>(count * sizeof(T))}};
}

/// Mean of `f` over the activities.
template <class F>
double mean(const std::vector<Activity>& list, const F& f) {
  double sum = 0;
  for (const Activity& a : list) sum += f(a);
  return sum / static_cast<double>(list.size());
}

/// "forward", "forward, chunk 1"
std::string key_of(const std::string& kind, int chunk) {
  return chunk == 0 ? kind : fmt::format("{}, chunk {}", kind, chunk);
}

double mean_over(const std::vector<Json>& ranks, const char* key) {
  double sum = 0;
  for (const Json& r : ranks) sum += r.at(key).get<double>();
  return sum / static_cast<double>(ranks.size());
}

/// Measured seconds of a task of `kind` and `chunk`: the mean over the ranks of a pipeline stage.
double measured_task(const std::vector<Json>& ranks, int pipeline_rank, TaskKind kind, int chunk) {
  const std::string key = key_of(std::string(name_of(kind)), chunk);
  double sum = 0;
  int count = 0;
  for (const Json& r : ranks) {
    if (r.at("pipeline") != pipeline_rank || !r.at("task_ms").contains(key)) continue;
    sum += 1e-3 * r.at("task_ms").at(key).get<double>();
    ++count;
  }
  return count == 0 ? 0.0 : sum / count;
}

pipeline::CostModel measured_costs(const pipeline::Schedule& schedule, const std::vector<Json>& ranks) {
  pipeline::CostModel cost;
  for (int stage = 0; stage < schedule.stages(); ++stage) {
    const auto task = [&](TaskKind kind) {
      return measured_task(ranks, schedule.rank_of(stage), kind, schedule.chunk_of(stage));
    };
    pipeline::StageCost c;
    c.teacher_forward_s = task(TaskKind::teacher_forward);
    c.forward_s = task(TaskKind::forward);
    c.backward_input_s = task(TaskKind::backward) + task(TaskKind::backward_input);  // a schedule has one of them
    c.backward_weight_s = task(TaskKind::backward_weight);
    c.align_s = task(TaskKind::align);
    cost.stages.push_back(c);
  }
  for (const Json& r : ranks) cost.update_s = std::max(cost.update_s, r.at("update_seconds").get<double>());
  return cost;
}

}  // namespace

Json describe_rank(const Mesh& mesh, const RankMemoryUse& memory, const std::vector<Activity>& activities) {
  const Coordinate& at = mesh.coordinate();
  Json row{{"rank", mesh.rank()},
           {"data", at.data},
           {"pipeline", at.pipeline},
           {"sequence", at.sequence},
           {"peak_bytes", memory.in_use},
           {"planned_bytes", memory.planned},
           {"planned_host_bytes", memory.planned_host},
           {"bytes_before", memory.before}};
  if (activities.empty()) return row;
  row["step_seconds"] = mean(activities, [](const Activity& a) { return a.step_s; });
  row["idle_share"] = mean(activities, [](const Activity& a) { return a.idle_share(); });
  row["idle_seconds"] = mean(activities, [](const Activity& a) { return a.idle_s; });
  row["update_seconds"] = mean(activities, [](const Activity& a) { return a.update_s; });
  row["held_up_seconds"] = mean(activities, [](const Activity& a) { return a.all.held_up_s; });
  row["message_seconds"] = mean(activities, [](const Activity& a) { return a.all.messages_s; });
  row["unhidden_seconds"] = mean(activities, [](const Activity& a) { return a.all.unhidden_s; });
  Json axes = Json::object(), tasks = Json::object();
  std::map<std::string, Activity::Along> sums;
  std::map<std::string, Activity::Work> work;
  for (const Activity& a : activities) {
    for (const auto& [axis, along] : a.axes) {
      Activity::Along& sum = sums[axis];
      sum.held_up_s += along.held_up_s;
      sum.messages_s += along.messages_s;
      sum.unhidden_s += along.unhidden_s;
    }
    for (const auto& [task, w] : a.tasks) {
      Activity::Work& sum = work[key_of(task.first, task.second)];
      sum.seconds += w.seconds;
      sum.count += w.count;
    }
  }
  const auto n = static_cast<double>(activities.size());
  for (const auto& [axis, sum] : sums) {
    axes[axis] = {{"held_up_seconds", sum.held_up_s / n},
                  {"message_seconds", sum.messages_s / n},
                  {"unhidden_seconds", sum.unhidden_s / n}};
  }
  for (const auto& [task, sum] : work) tasks[task] = 1e3 * sum.seconds / sum.count;
  row["axes"] = axes;
  row["task_ms"] = tasks;
  return row;
}

std::vector<Json> gather_ranks(MpiRuntime& runtime, const Json& own) {
  Communicator& world = runtime.world();
  const Stream stream = Stream::cpu();
  std::string text = own.dump();
  std::uint64_t size = text.size();
  std::vector<std::uint64_t> sizes(static_cast<std::size_t>(world.size()), size);
  world.all_gather(stream, bytes_of(&size, 1), bytes_of(sizes.data(), sizes.size()), Purpose::control);
  if (world.rank() != 0) {
    world.send(stream, bytes_of(text.data(), text.size()), 0, Purpose::control);
    return {};
  }
  std::vector<Json> all{own};
  for (int rank = 1; rank < world.size(); ++rank) {
    text.resize(sizes[static_cast<std::size_t>(rank)]);
    world.receive(stream, bytes_of(text.data(), text.size()), rank, Purpose::control);
    all.push_back(Json::parse(text));
  }
  return all;
}

Json summarize(const TrainingPlan& plan, const std::vector<Json>& ranks) {
  const pipeline::Schedule& schedule = plan.schedules.front();
  return {{"bubble_measured", mean_over(ranks, "idle_share")},
          {"bubble_simulated", simulate(schedule, measured_costs(schedule, ranks)).bubble},
          {"bubble_planned", simulate(schedule, plan.cost_model(0)).bubble},
          {"unhidden_communication_seconds", mean_over(ranks, "unhidden_seconds")},
          {"held_up_seconds", mean_over(ranks, "held_up_seconds")}};
}

std::string to_table(const Json& summary, const std::vector<Json>& ranks) {
  std::string text = fmt::format("{:<28} {:>8} {:>12} {:>12} {:>12} {:>10} {:>10}\n", "rank (data.pipeline.sequence)",
                                 "idle", "held up, ms", "messages, ms", "unhidden, ms", "peak, GiB", "plan, GiB");
  const auto number = [](const Json& r, const char* key) { return r.at(key).get<double>(); };
  const double gib = 1 << 30;
  for (const Json& r : ranks) {
    text += fmt::format("{:<28}", fmt::format("{} ({}.{}.{})", r.at("rank").get<int>(), r.at("data").get<int>(),
                                              r.at("pipeline").get<int>(), r.at("sequence").get<int>()));
    text += fmt::format(" {:>6.1f} % {:>12.1f} {:>12.1f} {:>12.1f} {:>10.2f} {:>10.2f}", 100 * number(r, "idle_share"),
                        1e3 * number(r, "held_up_seconds"), 1e3 * number(r, "message_seconds"),
                        1e3 * number(r, "unhidden_seconds"), number(r, "peak_bytes") / gib,
                        number(r, "planned_bytes") / gib);
    for (const auto& [axis, along] : r.at("axes").items()) {
      text += fmt::format("  {} {:.1f}/{:.1f}", axis, 1e3 * number(along, "held_up_seconds"),
                          1e3 * number(along, "unhidden_seconds"));
    }
    text += "\n";
  }
  return text + fmt::format(
                    "bubble: measured {:.1f} %; simulated {:.1f} % with the measured tasks, {:.1f} % with the plan's; "
                    "communication not hidden {:.1f} ms a rank and step (by axis: held up/unhidden)\n",
                    100 * number(summary, "bubble_measured"), 100 * number(summary, "bubble_simulated"),
                    100 * number(summary, "bubble_planned"), 1e3 * number(summary, "unhidden_communication_seconds"));
}

}  // namespace deltapipe::bench
