#include "comm/mpi_runtime.h"

#include "comm/mpi_communicator.h"
#include "comm/progress.h"
#include "core/log.h"

#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
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

/// Where a rank may run; plain bytes on the wire.
struct Place {
  std::array<char, 64> host{};
  cpu_set_t cores{};
};

/// Ends the process when the calls in its scope do not return in time.
class Deadline {
 public:
  Deadline(const char* what, double seconds)
      : thread_([this, what, seconds] {
          std::unique_lock lock(mutex_);
          if (done_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return is_done_; })) return;
          std::fprintf(stderr, "error: %s has waited %g s for other ranks\n", what, seconds);
          std::_Exit(CommunicationError("").exit_code());
        }) {}
  ~Deadline() {
    {
      const std::lock_guard lock(mutex_);
      is_done_ = true;
    }
    done_.notify_one();
    thread_.join();
  }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  bool is_done_ = false;
  std::thread thread_;
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
  std::optional<Deadline> deadline;
  if (launch.mpi) {
    deadline.emplace("MPI_Init", settings.timeout_s);
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
  const bool leaving = std::uncaught_exceptions() > uncaught_ && !failed_together_ && size() > 1;
  if (!started_ || leaving || !mpi_is_up()) return;
  try {
    world_->barrier(Stream::cpu());
  } catch (const Error& e) {
    log::error("{}", e.what());
    abort_all(e.exit_code());
  }
  const Deadline deadline("MPI_Finalize", settings().timeout_s);
  world_.reset();
  MPI_Finalize();
}

std::unique_ptr<Communicator> MpiRuntime::split(int color, int key, const std::string& axis) {
  if (size() == 1) return std::make_unique<SingleRank>(axis);
  world_->barrier(Stream::cpu());
  const Deadline deadline("MPI_Comm_split", settings().timeout_s);
  return split_world(progress_, color, key, axis);
}

int MpiRuntime::own_cores() {
  std::vector<Place> all(static_cast<std::size_t>(size()));
  Place own;
  gethostname(own.host.data(), own.host.size() - 1);
  if (sched_getaffinity(0, sizeof own.cores, &own.cores) != 0) CPU_SET(0, &own.cores);
  constexpr auto bytes = static_cast<std::int64_t>(sizeof(Place));
  world_->all_gather(Stream::cpu(), Tensor(&own, DType::u8, {bytes}), Tensor(all.data(), DType::u8, {size() * bytes}),
                     Purpose::control);
  const auto sharing = std::count_if(all.begin(), all.end(), [&](const Place& other) {
    return other.host == own.host && CPU_EQUAL(&other.cores, &own.cores) != 0;
  });
  return std::max(1, CPU_COUNT(&own.cores) / static_cast<int>(sharing));
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
  together([&] {
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
  });
}

void MpiRuntime::together(const std::function<void()>& f) {
  std::exception_ptr own;
  std::int32_t code = 0;
  try {
    f();
  } catch (const Error& e) {
    own = std::current_exception();
    code = e.exit_code();
  } catch (const std::exception&) {
    own = std::current_exception();
    code = InternalError("").exit_code();
  }
  std::vector<std::int32_t> codes(static_cast<std::size_t>(size()), code);
  if (size() > 1) {
    world_->all_gather(Stream::cpu(), Tensor(&code, DType::i32, {1}), Tensor(codes.data(), DType::i32, {size()}),
                       Purpose::control);
  }
  const auto first = std::find_if(codes.begin(), codes.end(), [](std::int32_t x) { return x != 0; });
  if (first == codes.end()) return;
  failed_together_ = true;
  const auto teller = static_cast<int>(first - codes.begin());
  if (teller == rank()) std::rethrow_exception(own);
  throw PeerError(teller, *first);
}

void MpiRuntime::abort_all(int code) {
  std::fflush(nullptr);
  if (mpi_is_up()) MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

}  // namespace deltapipe
