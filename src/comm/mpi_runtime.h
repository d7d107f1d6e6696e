// One process of the job: MPI from start to end, the rank's place in the world, and the watchdog's settings.
//
// Without a launcher (mpirun, or srun with PMIx) MPI is never started and the process is a world of one rank.
// MPI is started with MPI_THREAD_FUNNELED: data loading, checkpoint writing and OpenMP run on other threads, and only
// the thread that made the runtime calls MPI; a call from another thread throws InternalError. More would cost locks.
//
// Faults
// - A silent rank (stopped, stuck, in another place of the program): every wait polls with a deadline and throws
//   CommunicationError. `main` prints that line and calls abort_all, and the launcher ends the other ranks, the silent
//   one included.
// - A dead rank (killed, crashed, out of memory): Open MPI's mpirun sees the process end without MPI_Finalize and ends
//   the job itself, as srun does with --kill-on-bad-exit; where the launcher does not, the deadline does.
// - While any other exception leaves the runtime's scope, MPI_Finalize, which waits for all ranks, is not called: call
//   abort_all(error.exit_code()) after printing.
// MPI_Init, communicator splits and MPI_Finalize cannot be given up: when one does not return within timeout_s, the
// process prints a line and ends itself with CommunicationError's code, and the launcher ends the others.
// - An error that all ranks know of (together): they end MPI in step, after the one that tells has told, for a launcher
//   kills the whole job as soon as any rank exits with a code other than 0.
#pragma once

#include "comm/communicator.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace deltapipe {

class Progress;

class MpiRuntime {
 public:
  /// Starts MPI when the process was launched for it. Throws CommunicationError when the launcher and MPI disagree
  /// about the number of ranks. One at a time, and one with MPI in the life of a process.
  explicit MpiRuntime(const CommunicationSettings& settings = {});
  /// Ends MPI together with all other ranks. Communicators must be gone.
  ~MpiRuntime();
  MpiRuntime(const MpiRuntime&) = delete;
  MpiRuntime& operator=(const MpiRuntime&) = delete;

  int rank() const { return world_->rank(); }
  int size() const { return world_->size(); }
  int local_rank() const { return local_rank_; }  // among the ranks of this host, by MPI_Comm_split_type
  int local_size() const { return local_size_; }

  /// Threads for this rank when all ranks of its host work: the cores that it may run on, shared with the ranks that
  /// may run on the same ones. Collective.
  int own_cores();

  /// All ranks, in world order.
  Communicator& world() { return *world_; }
  /// Collective over the world: ranks of one `color` (>= 0), ordered by `key`. One rank alone is a SingleRank.
  std::unique_ptr<Communicator> split(int color, int key, const std::string& axis);

  /// May change between operations, on every rank alike.
  CommunicationSettings& settings();
  /// Where the program is ("step 12"), for error lines.
  void set_where(std::string where);

  /// Runs `f`, which may fail on any rank but talks to none, on every rank. When it failed anywhere this throws on all:
  /// its error on the first rank that has one, PeerError on the others, so that one line is printed: while this object
  /// lives, for its end waits for that rank. All ranks then end MPI together, and the job's exit code is that of the
  /// error.
  void together(const std::function<void()>& f);

  /// Whether together() has thrown, on all ranks.
  bool failed_together() const { return failed_together_; }

  /// Start-up check over all ranks that they run the same binary version and configuration. (That they are in one world
  /// is checked by the constructor: ranks in different worlds cannot ask each other.)
  /// Throws on every rank, as together() does: a CommunicationError that names the first rank that differs from rank 0.
  void agree(std::string_view version, std::uint64_t config_hash);

  /// Ends every rank of the job with `code`; without MPI, this process. Works during and after the runtime's life.
  [[noreturn]] static void abort_all(int code);

 private:
  bool started_ = false;
  bool failed_together_ = false;
  int uncaught_;  // exceptions in flight at construction
  std::shared_ptr<Progress> progress_;
  std::unique_ptr<Communicator> world_;
  int local_rank_ = 0, local_size_ = 1;
};

/// What the environment says about how this process was started. `get` is std::getenv or a test's own.
struct Launch {
  bool mpi = false;  // by mpirun or srun with PMIx or PMI
  int ranks = 0;     // that the launcher started; 0: it does not say
};
Launch detect_launch(const std::function<const char*(const char*)>& get);

}  // namespace deltapipe
