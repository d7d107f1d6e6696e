#include "comm/mpi_runtime.h"

#include "comm/mpi_communicator.h"
#include "comm/nccl_communicator.h"
#include "comm/progress.h"
#include "core/log.h"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

namespace deltapipe {
namespace {

int number_or_zero(const char* text) {
  int value = 0;
  if (text != nullptr) std::from_chars(text, text + std::strlen(text), value);
  return value;
}

/// What a rank says of itself in agree(); plain bytes on the wire.
struct Identity {
  std::array<char, 64> version{};
  std::uint64_t config_hash = 0;
};

}  // namespace

Launch detect_launch(const std::function<const char*(const char*)>& get) {
  Launch launch;
  // Open MPI's mpirun; PMIx (srun --mpi=pmix, prterun); PMI (srun --mpi=pmi2, Hydra). OMPI_MCA_* are settings, not a
  // launch.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) launch.mpi |= get(name) != nullptr;
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    if (launch.ranks == 0) launch.ranks = number_or_zero(get(name));
  }
  return launch;
}

MpiRuntime::MpiRuntime(const CommunicationSettings& settings)
    : uncaught_(std::uncaught_exceptions()), progress_(std::make_shared<Progress>(settings)) {
  const Launch launch = detect_launch([](const char* name) { return std::getenv(name); });
  int size = 1;
  if (launch.mpi) {
    require(!mpi_is_up(), "MpiRuntime: MPI is running already");
    int provided = MPI_THREAD_SINGLE;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
      fail<CommunicationError>("MPI did not start");
    }
    started_ = true;
    if (provided < MPI_THREAD_FUNNELED) {
      fail<CommunicationError>("this MPI allows no other threads (MPI_THREAD_FUNNELED)");
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
  }
  if (launch.ranks > 1 && launch.ranks != size) {
    fail<CommunicationError>(
        "the launcher started {} ranks but MPI sees {}: start with the mpirun of the same MPI, or srun --mpi=pmix",
        launch.ranks, size);
  }
  if (!started_) {
    world_ = std::make_unique<SingleRank>("world");
    return;
  }
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  world_ = split_world(progress_, 0, rank, "world");
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &host);
  MPI_Comm_rank(host, &local_rank_);
  MPI_Comm_size(host, &local_size_);
  MPI_Comm_free(&host);
}

MpiRuntime::~MpiRuntime() {
  if (!started_ || std::uncaught_exceptions() > uncaught_ || !mpi_is_up()) return;
  try {
    world_->barrier(Stream::cpu());
  } catch (const Error& e) {
    log::error("{}", e.what());
    abort_all(e.exit_code());
  }
  world_.reset();
  MPI_Finalize();
}

std::unique_ptr<Communicator> MpiRuntime::split(int color, int key, const std::string& axis) {
  if (size() == 1) return std::make_unique<SingleRank>(axis);
  world_->barrier(Stream::cpu());
  return split_world(progress_, color, key, axis);
}

std::unique_ptr<Communicator> MpiRuntime::on_device([[maybe_unused]] Communicator& host, Device device) {
  require(device.is_cuda(), "MpiRuntime::on_device: not a CUDA device");
#ifdef DELTAPIPE_CUDA
  return make_nccl_communicator(progress_, host, device);
#else
  fail<UsageError>("this binary was built without CUDA: use device \"cpu\"");
#endif
}

CommunicationSettings& MpiRuntime::settings() { return progress_->settings(); }

void MpiRuntime::set_where(std::string where) { progress_->set_where(std::move(where)); }

void MpiRuntime::agree(std::string_view version, std::uint64_t config_hash) {
  Identity own;
  own.config_hash = config_hash;
  version.copy(own.version.data(), own.version.size() - 1);
  std::vector<Identity> all(static_cast<std::size_t>(size()));
  constexpr auto bytes = static_cast<std::int64_t>(sizeof(Identity));
  world_->all_gather(Stream::cpu(), Tensor(&own, DType::u8, {bytes}), Tensor(all.data(), DType::u8, {size() * bytes}),
                     Purpose::control);
  const Identity& first = all.front();
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    const Identity& other = all[rank];
    if (other.version != first.version) {
      fail<CommunicationError>("rank {} runs version {}, rank 0 version {}: install one binary on every host", rank,
                               other.version.data(), first.version.data());
    }
    if (other.config_hash != first.config_hash) {
      fail<CommunicationError>("rank {} has another configuration than rank 0 (hash {:016x}, not {:016x})", rank,
                               other.config_hash, first.config_hash);
    }
  }
}

void MpiRuntime::abort_all(int code) {
  std::fflush(nullptr);
  if (mpi_is_up()) MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

}  // namespace deltapipe
