// What the ranks of a mesh did in traced steps, as the step benchmark tells it: a JSON object a rank, and of all ranks
// together the measured and the simulated bubble.
#pragma once

#include "comm/mpi_runtime.h"
#include "train/activity.h"
#include "train/trainer.h"

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace deltapipe::bench {

/// A rank's memory, in bytes; of the device's, in_use and before count whatever process took it.
struct RankMemoryUse {
  std::size_t planned = 0, planned_host = 0, before = 0, in_use = 0;
};

/// Of this rank: place in the mesh, memory, and without any activities nothing else; otherwise means over them.
nlohmann::ordered_json describe_rank(const Mesh& mesh, const RankMemoryUse& memory,
                                     const std::vector<Activity>& activities);

/// Every rank's object on rank 0, in the order of the ranks; elsewhere nothing. Collective.
std::vector<nlohmann::ordered_json> gather_ranks(MpiRuntime& runtime, const nlohmann::ordered_json& own);

/// Keys of a row, from the objects of all ranks: bubble_measured, the mean of the ranks' idle shares;
/// bubble_simulated, the schedule played with the measured seconds of every stage's tasks and of the update, messages
/// free; bubble_planned, the same with the time model's; means of what communication took.
nlohmann::ordered_json summarize(const TrainingPlan& plan, const std::vector<nlohmann::ordered_json>& ranks);

/// The same for people: a line a rank, and one for all.
std::string to_table(const nlohmann::ordered_json& summary, const std::vector<nlohmann::ordered_json>& ranks);

}  // namespace deltapipe::bench
