// A small job on any mesh, with weights and data that depend on names and numbers alone, for comparing meshes.
#pragma once

#include "comm/mesh.h"
#include "core/device_memory.h"
#include "data/loader.h"
#include "tests/data/testing.h"
#include "train/trainer.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace deltapipe::testing {

/// One way to run the job; everything but `shape`, `layout` and the schedule changes its result.
struct MeshCase {
  std::string student = "hybrid";  // hybrid, kda or llama (gated MLP, tied embeddings, rope)
  bool aligns = false;             // mixer alignment instead of the losses on logits and hidden states
  MeshShape shape;
  LayoutKind layout = LayoutKind::contiguous;
  std::string schedule = "1f1b";
  int chunks = 1;
  std::string teacher = "inline";
  bool recompute = false;
  std::int64_t length = 96;  // tokens of a sequence: 8 segments of 12, and 2, 3, 4 or 6
  Device device;             // on CUDA the models are a little larger, as its kernels want them
  bool large = false;        // as large as on CUDA
  bool rounded = false;      // first weights are what bfloat16 holds, whatever the dtype
  /// Of both models: 4, or 8 where the pipeline has more stages.
  std::int64_t layers() const { return shape.pipeline * chunks > 4 ? 8 : 4; }
  std::string name() const;
};

inline constexpr std::int64_t mesh_job_steps = 10;

class MeshJob {
 public:
  /// Collective over `mesh`; `layers` of both models. Each rank writes the same small dataset into a folder of its own.
  /// `change`, when given, acts on the plan before anything is built from it.
  using Change = std::function<void(TrainingPlan&)>;
  MeshJob(const MeshCase& which, Mesh& mesh, DType dtype, std::int64_t layers, const Change& change = {});

  StepReport step(std::int64_t n) { return trainer_->step(loader_.get(), n); }
  StepReport accumulate(std::int64_t n) { return trainer_->accumulate(loader_.get(), n); }
  Trainer& trainer() { return *trainer_; }
  Stream stream() const { return stream_.get(); }
  const SequenceLoader* loader() const { return loader_.get(); }
  const WindowReader& validation() const { return *validation_; }
  const TrainingPlan& plan() const { return plan_; }

  /// Every parameter of the whole student in canonical order: its gradient after accumulate(), or its weights; the same
  /// on all ranks.
  std::vector<std::vector<double>> gradients();
  std::vector<std::vector<double>> weights();
  std::vector<std::string> names() const;

 private:
  std::vector<std::vector<double>> collect(const std::function<Tensor(const Optimizer::State&)>& part);

  Mesh& mesh_;
  TrainingPlan plan_;
  TemporaryFolder folder_;
  std::unique_ptr<TokenDataset> data_;
  std::unique_ptr<SequenceLoader> loader_;
  std::unique_ptr<WindowReader> validation_;
  StreamOwner stream_;
  ArenaSet arenas_ = ArenaSet::measuring(Device());
  std::unique_ptr<Trainer> trainer_;
};

}  // namespace deltapipe::testing
