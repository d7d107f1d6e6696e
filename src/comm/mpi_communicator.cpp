#include "comm/mpi_communicator.h"

#include "comm/block_copy.h"
#include "comm/progress.h"
#include "kernels/elementwise.h"

#include <mpi.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

namespace deltapipe {
namespace {

constexpr std::size_t small_all_reduce_bytes = 16 << 10;  // below, latency costs more than sending everything
constexpr std::int64_t smallest_block = 256;              // elements; tiny blocks cost more in messages than memory

void check_mpi(int code, const char* operation, const std::string& axis) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  fail<CommunicationError>("{} on axis {}: {}", operation, axis,
                           std::string_view(text, static_cast<std::size_t>(length)));
}

class MpiOperation;

class MpiCommunicator final : public Communicator {
 public:
  /// `plans_device`, of a planned communicator: what it stands for carries device memory, over NCCL.
  MpiCommunicator(std::shared_ptr<Progress> progress, MPI_Comm comm, int rank, int size, const std::string& axis,
                  bool plans_device = false);
  ~MpiCommunicator() override;

 private:
  friend class MpiOperation;

  Pending do_exchange(const Stream&, std::span<const Transfer> sends, std::span<const Transfer> receives,
                      Purpose purpose, const char* operation) override;
  Pending do_all_reduce(const Stream&, const Tensor& x, const Tensor& scratch, Purpose purpose) override;
  Pending do_all_gather(const Stream&, const Tensor& part, const Tensor& whole, Purpose purpose) override;
  Pending do_reduce_scatter(const Stream&, const Tensor& whole, const Tensor& part, const Tensor& scratch,
                            Purpose purpose) override;
  void do_broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) override;
  void do_barrier(const Stream& stream, Purpose purpose) override;
  std::int64_t all_reduce_scratch(std::int64_t elements, DType dtype) const override;
  std::int64_t reduce_scatter_scratch(std::int64_t part_elements, DType dtype) const override;
  bool can_sum(DType dtype) const override { return Communicator::can_sum(dtype) || plans_device_; }

  /// Elements of a part that one block of a reduce-scatter holds.
  std::int64_t block_elements(std::int64_t part_elements, DType dtype) const;
  static bool is_small(std::int64_t elements, DType dtype) {
    return static_cast<std::size_t>(elements) * size_of(dtype) <= small_all_reduce_bytes;
  }
  MpiOperation& take(const char* name, Purpose purpose, int tag);
  MpiOperation& take_collective(const char* name, Purpose purpose) { return take(name, purpose, next_tag()); }
  /// Collective operations use the tags above max_tag, of which MPI promises as many again: their messages never match
  /// those of exchanges.
  int next_tag() { return max_tag + 1 + std::exchange(collectives_, (collectives_ + 1) % (max_tag + 1)); }

  std::shared_ptr<Progress> progress_;
  MPI_Comm comm_;
  bool plans_device_;
  std::vector<int> world_ranks_;
  int collectives_ = 0;  // started so far, modulo the tags they have: the same on every rank
  bool failed_ = false;  // an operation was abandoned: the communicators are not freed
  std::vector<std::unique_ptr<MpiOperation>> operations_;  // all ever made; kept, so that a step makes none
  std::vector<MpiOperation*> idle_;
};

/// One operation from start to end: rounds of messages, each followed by sums when all have arrived.
class MpiOperation final : public PendingOperation, public Progress::Operation {
 public:
  explicit MpiOperation(MpiCommunicator& owner) : owner_(owner) {}

  void begin(const char* name, Purpose purpose, int tag) {
    name_ = name;
    purpose_ = purpose;
    tag_ = tag;
    clear_requests();
    phase_ = Phase::messages;
    finished_ = false;
    owner_.progress_->add(this);
  }

  void post_send(const void* data, std::size_t bytes, int peer, int tag) {
    owner_.count_message(purpose_, bytes);
    const auto* p = static_cast<const std::byte*>(data);
    for_pieces(bytes, [&](std::size_t offset, int count) {
      check(MPI_Isend(p + offset, count, MPI_BYTE, peer, tag, owner_.comm_, &add_request(peer, -1)));
    });
  }
  void post_receive(void* data, std::size_t bytes, int peer, int tag) {
    auto* p = static_cast<std::byte*>(data);
    for_pieces(bytes, [&](std::size_t offset, int count) {
      check(MPI_Irecv(p + offset, count, MPI_BYTE, peer, tag, owner_.comm_, &add_request(peer, count)));
    });
  }

  /// Every rank sends `part` to every other.
  void begin_all_gather(const Tensor& part, const Tensor& whole) {
    set_whole(whole, part.numel());
    copy_all(Stream::cpu(), part, own_slice());
    post_gather();
  }
  void begin_reduce_scatter(const Tensor& whole, const Tensor& part, const Tensor& scratch) {
    set_whole(whole, part.numel());
    begin_reduction(part, scratch, false);
  }
  void begin_all_reduce(const Tensor& x, const Tensor& scratch) {
    set_whole(x, (x.numel() + owner_.size() - 1) / owner_.size());
    begin_reduction(own_slice(), scratch, true);
  }
  void begin_small_all_reduce(const Tensor& x, const Tensor& scratch) {
    set_whole(x, x.numel());
    scratch_ = scratch.view({owner_.size() - 1, x.numel()});
    phase_ = Phase::sum_wholes;
    for_peers([&](int peer) { receive_tensor(scratch_.at(row_of(peer)), peer); });
    for_peers([&](int peer) { send_tensor(x, peer); });
    owner_.count_round(purpose_);
  }

  void advance() override {
    if (finished_) return;
    while (messages_have_arrived()) {
      clear_requests();
      if (!next_round()) {
        finished_ = true;
        return;
      }
    }
  }

  bool test() override {
    owner_.progress_->advance_all();
    return finished_;
  }

  void wait(const Stream&) override {
    if (!owner_.progress_->wait_until([&] { return finished_; })) fail_silent();
  }

  void release() noexcept override {
    owner_.progress_->remove(this);
    if (!finished_) abandon();
    owner_.idle_.push_back(this);  // never grows: room for all operations is reserved when one is made
  }

 private:
  enum class Phase { messages, reduce, reduce_then_gather, sum_wholes };
  struct Request {
    int peer;
    int bytes;  // expected; -1 for a send
  };

  MPI_Request& add_request(int peer, int bytes) {
    requests_.push_back({peer, bytes});
    return handles_.emplace_back(MPI_REQUEST_NULL);
  }
  void clear_requests() {
    requests_.clear();
    handles_.clear();
  }

  void check(int code) const { check_mpi(code, name_, owner_.axis()); }

  template <class F>
  void for_pieces(std::size_t bytes, const F& f) const {
    const std::size_t piece = owner_.progress_->settings().message_bytes;
    std::size_t offset = 0;
    do {
      const std::size_t n = std::min(piece, bytes - offset);
      f(offset, static_cast<int>(n));
      offset += n;
    } while (offset < bytes);
  }
  /// Peers in an order that starts after this rank, so that ranks do not all begin with rank 0.
  template <class F>
  void for_peers(const F& f) const {
    for (int i = 1; i < owner_.size(); ++i) f((owner_.rank() + i) % owner_.size());
  }
  std::int64_t row_of(int peer) const { return peer < owner_.rank() ? peer : peer - 1; }
  void send_tensor(const Tensor& t, int peer) {
    if (t.numel() > 0) post_send(t.data, t.bytes(), peer, tag_);
  }
  void receive_tensor(const Tensor& t, int peer) {
    if (t.numel() > 0) post_receive(t.data, t.bytes(), peer, tag_);
  }

  void set_whole(const Tensor& whole, std::int64_t part) {
    whole_ = whole.view({whole.numel()});
    part_elements_ = part;
  }
  /// Elements [begin, end) of the rank's part; parts at the end of the whole may be shorter or empty.
  Tensor slice(int rank, std::int64_t begin, std::int64_t end) const {
    const std::int64_t n = whole_.numel(), first = rank * part_elements_;
    return whole_.rows(std::min(first + begin, n), std::min(first + end, n));
  }
  Tensor own_slice() const { return slice(owner_.rank(), 0, part_elements_); }

  void begin_reduction(const Tensor& part, const Tensor& scratch, bool then_gather) {
    part_ = part.view({part.numel()});
    block_ = owner_.block_elements(part_elements_, part.dtype);
    scratch_ = scratch.view({owner_.size() - 1, block_});
    next_ = 0;
    phase_ = then_gather ? Phase::reduce_then_gather : Phase::reduce;
    post_block();
  }
  std::int64_t block_end() const { return std::min(next_ + block_, part_elements_); }
  void post_block() {
    const Tensor own = slice(owner_.rank(), next_, block_end());
    for_peers([&](int peer) { receive_tensor(scratch_.at(row_of(peer)).rows(0, own.numel()), peer); });
    for_peers([&](int peer) { send_tensor(slice(peer, next_, block_end()), peer); });
    owner_.count_round(purpose_);
  }
  void post_gather() {
    for_peers([&](int peer) { receive_tensor(slice(peer, 0, part_elements_), peer); });
    for_peers([&](int peer) { send_tensor(own_slice(), peer); });
    owner_.count_round(purpose_);
    phase_ = Phase::messages;
  }
  /// out = sum over the ranks in rank order; `own` is this rank's term and may be `out` itself.
  void sum_in_rank_order(const Tensor& own, const Tensor& out) {
    if (own.numel() == 0) return;
    const Stream stream = Stream::cpu();
    const auto term = [&](int rank) {
      return rank == owner_.rank() ? own : scratch_.at(row_of(rank)).rows(0, own.numel());
    };
    const Tensor sum = owner_.rank() == 0 ? out : term(0);
    if (owner_.rank() == 0) copy_all(stream, own, out);
    for (int rank = 1; rank < owner_.size(); ++rank) kernels::add_in_place(stream, term(rank), sum);
    copy_all(stream, sum, out);
  }

  /// Called when all messages of a round have arrived; false when it was the last.
  bool next_round() {
    switch (phase_) {
      case Phase::messages: return false;
      case Phase::sum_wholes: sum_in_rank_order(whole_, whole_); return false;
      case Phase::reduce:
      case Phase::reduce_then_gather: break;
    }
    const Tensor own = slice(owner_.rank(), next_, block_end());
    sum_in_rank_order(own, own.numel() == 0 ? own : part_.rows(next_, next_ + own.numel()));
    next_ = block_end();
    if (next_ < part_elements_) {
      post_block();
    } else if (phase_ == Phase::reduce_then_gather) {
      post_gather();
    } else {
      return false;
    }
    return true;
  }

  /// One call for all requests: each call into MPI may give the processor away.
  bool messages_have_arrived() {
    const auto count = static_cast<int>(handles_.size());
    completed_.resize(handles_.size());
    statuses_.resize(handles_.size());
    int done = 0;
    const int code = MPI_Testsome(count, handles_.data(), &done, completed_.data(), statuses_.data());
    if (done == MPI_UNDEFINED) return true;  // none are left
    if (code != MPI_ERR_IN_STATUS) check(code);
    for (int i = 0; i < done; ++i) {
      MPI_Status& status = statuses_[static_cast<std::size_t>(i)];
      if (code == MPI_ERR_IN_STATUS) check(status.MPI_ERROR);
      const Request& r = requests_[static_cast<std::size_t>(completed_[static_cast<std::size_t>(i)])];
      if (r.bytes < 0) continue;
      int bytes = 0;
      MPI_Get_count(&status, MPI_BYTE, &bytes);
      if (bytes != r.bytes) {
        fail<CommunicationError>("{} ({}) on axis {}: {} bytes came from world rank {}, expected {}", name_,
                                 name_of(purpose_), owner_.axis(), bytes, world_rank(r.peer), r.bytes);
      }
    }
    return std::all_of(handles_.begin(), handles_.end(), [](MPI_Request h) { return h == MPI_REQUEST_NULL; });
  }

  int world_rank(int peer) const { return owner_.world_ranks_[static_cast<std::size_t>(peer)]; }

  [[noreturn]] void fail_silent() const {
    std::vector<int> silent;
    for (std::size_t i = 0; i < handles_.size(); ++i) {
      if (handles_[i] != MPI_REQUEST_NULL) silent.push_back(world_rank(requests_[i].peer));
    }
    std::sort(silent.begin(), silent.end());
    silent.erase(std::unique(silent.begin(), silent.end()), silent.end());
    std::string list;
    for (const int rank : silent) list += (list.empty() ? "" : ", ") + std::to_string(rank);
    const std::string& where = owner_.progress_->where();
    fail<CommunicationError>("{} ({}) on axis {}{}{}: world rank {} has waited {:g} s for world rank{} {}", name_,
                             name_of(purpose_), owner_.axis(), where.empty() ? "" : ", ", where,
                             world_rank(owner_.rank()), owner_.progress_->settings().timeout_s,
                             silent.size() == 1 ? "" : "s", list);
  }

  /// A receive that has not begun is cancelled; what is under way may still write until the process ends.
  void abandon() noexcept {
    owner_.failed_ = true;
    if (!mpi_is_up()) return;
    for (std::size_t i = 0; i < handles_.size(); ++i) {
      if (handles_[i] == MPI_REQUEST_NULL) continue;
      int done = 0;
      if (requests_[i].bytes >= 0) {
        MPI_Cancel(&handles_[i]);
        MPI_Test(&handles_[i], &done, MPI_STATUS_IGNORE);
      }
      if (done == 0) MPI_Request_free(&handles_[i]);
    }
    clear_requests();
    finished_ = true;
  }

  MpiCommunicator& owner_;
  const char* name_ = "";
  Purpose purpose_ = Purpose::control;
  int tag_ = 0;
  std::vector<Request> requests_;  // of handles_[i]
  std::vector<MPI_Request> handles_;
  std::vector<int> completed_;  // results of MPI_Testsome
  std::vector<MPI_Status> statuses_;
  Phase phase_ = Phase::messages;
  bool finished_ = true;
  // Of reductions and gathers: `whole` in parts of `part_elements`, one a rank; `scratch` has a row a peer.
  Tensor whole_, part_, scratch_;
  std::int64_t part_elements_ = 0, block_ = 0, next_ = 0;
};

MpiCommunicator::MpiCommunicator(std::shared_ptr<Progress> progress, MPI_Comm comm, int rank, int size,
                                 const std::string& axis, bool plans_device)
    : Communicator(rank, size, axis), progress_(std::move(progress)), comm_(comm), plans_device_(plans_device) {
  if (comm_ == MPI_COMM_NULL) return;  // planned
  world_ranks_.resize(static_cast<std::size_t>(size));
  std::vector<int> own(world_ranks_.size());
  for (int i = 0; i < size; ++i) own[static_cast<std::size_t>(i)] = i;
  MPI_Group group, world;
  check_mpi(MPI_Comm_group(comm_, &group), "MPI_Comm_group", axis);
  check_mpi(MPI_Comm_group(MPI_COMM_WORLD, &world), "MPI_Comm_group", axis);
  check_mpi(MPI_Group_translate_ranks(group, size, own.data(), world, world_ranks_.data()), "translating ranks", axis);
  MPI_Group_free(&group);
  MPI_Group_free(&world);
}

MpiCommunicator::~MpiCommunicator() {
  if (comm_ == MPI_COMM_NULL || failed_ || std::uncaught_exceptions() > 0 || !mpi_is_up())
    return;  // freeing may wait for the other ranks
  MPI_Comm_free(&comm_);
}

MpiOperation& MpiCommunicator::take(const char* name, Purpose purpose, int tag) {
  require(comm_ != MPI_COMM_NULL, "a planned communicator carries nothing");
  if (idle_.empty()) {
    operations_.push_back(std::make_unique<MpiOperation>(*this));
    idle_.reserve(operations_.size());
    idle_.push_back(operations_.back().get());
  }
  MpiOperation& operation = *idle_.back();
  idle_.pop_back();
  operation.begin(name, purpose, tag);
  return operation;
}

Pending MpiCommunicator::do_exchange(const Stream& stream, std::span<const Transfer> sends,
                                     std::span<const Transfer> receives, Purpose purpose, const char* name) {
  require(stream.device().is_cpu(), "communication over MPI: host memory only");
  MpiOperation& operation = take(name, purpose, 0);
  Pending pending(&operation);
  for (const Transfer& t : receives) operation.post_receive(t.tensor.data, t.tensor.bytes(), t.peer, t.tag);
  for (const Transfer& t : sends) operation.post_send(t.tensor.data, t.tensor.bytes(), t.peer, t.tag);
  count_round(purpose);
  return pending;
}

Pending MpiCommunicator::do_all_gather(const Stream&, const Tensor& part, const Tensor& whole, Purpose purpose) {
  MpiOperation& operation = take_collective("all_gather", purpose);
  Pending pending(&operation);
  operation.begin_all_gather(part, whole);
  return pending;
}

Pending MpiCommunicator::do_reduce_scatter(const Stream&, const Tensor& whole, const Tensor& part,
                                           const Tensor& scratch, Purpose purpose) {
  MpiOperation& operation = take_collective("reduce_scatter_sum", purpose);
  Pending pending(&operation);
  operation.begin_reduce_scatter(whole, part, scratch);
  return pending;
}

Pending MpiCommunicator::do_all_reduce(const Stream&, const Tensor& x, const Tensor& scratch, Purpose purpose) {
  MpiOperation& operation = take_collective("all_reduce_sum", purpose);
  Pending pending(&operation);
  if (is_small(x.numel(), x.dtype)) {
    operation.begin_small_all_reduce(x, scratch);
  } else {
    operation.begin_all_reduce(x, scratch);
  }
  return pending;
}

void MpiCommunicator::do_broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) {
  // Relative to the root, rank r receives from r without its highest bit, then sends to r + 2^k for larger 2^k.
  const int tag = next_tag(), relative = (rank() - root + size()) % size();
  const auto run = [&](int to, bool sending) {
    MpiOperation& operation = take("broadcast", purpose, tag);
    Pending pending(&operation);
    const int peer = (to + root) % size();
    if (sending) {
      operation.post_send(x.data, x.bytes(), peer, tag);
    } else {
      operation.post_receive(x.data, x.bytes(), peer, tag);
    }
    return pending;
  };
  for (int bit = 1; bit < size(); bit *= 2) {
    count_round(purpose);
    if (relative >= bit && relative < 2 * bit) {
      run(relative - bit, false).wait(stream);
    } else if (relative < bit && relative + bit < size()) {
      run(relative + bit, true).wait(stream);
    }
  }
}

void MpiCommunicator::do_barrier(const Stream& stream, Purpose purpose) {
  for (int distance = 1; distance < size(); distance *= 2) {
    const int tag = next_tag();
    MpiOperation& operation = take("barrier", purpose, tag);
    Pending pending(&operation);
    operation.post_receive(nullptr, 0, (rank() - distance + size()) % size(), tag);
    operation.post_send(nullptr, 0, (rank() + distance) % size(), tag);
    count_round(purpose);
    pending.wait(stream);
  }
}

std::int64_t MpiCommunicator::block_elements(std::int64_t part_elements, DType dtype) const {
  const auto share = static_cast<std::int64_t>(progress_->settings().reduce_bytes / size_of(dtype)) / (size() - 1);
  return std::min(part_elements, std::max(share, smallest_block));
}

std::int64_t MpiCommunicator::reduce_scatter_scratch(std::int64_t part_elements, DType dtype) const {
  return part_elements == 0 || plans_device_ ? 0 : (size() - 1) * block_elements(part_elements, dtype);
}

std::int64_t MpiCommunicator::all_reduce_scratch(std::int64_t elements, DType dtype) const {
  if (plans_device_) return 0;
  if (is_small(elements, dtype)) return (size() - 1) * elements;
  return reduce_scatter_scratch((elements + size() - 1) / size(), dtype);
}

}  // namespace

bool mpi_is_up() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

std::unique_ptr<Communicator> split_world(const std::shared_ptr<Progress>& progress, int color, int key,
                                          const std::string& axis) {
  MPI_Comm comm = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split(MPI_COMM_WORLD, color, key, &comm), "MPI_Comm_split", axis);
  int rank = 0, size = 1;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  if (size == 1) {
    MPI_Comm_free(&comm);
    return std::make_unique<SingleRank>(axis);
  }
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  return std::make_unique<MpiCommunicator>(progress, comm, rank, size, axis);
}

std::unique_ptr<Communicator> planned_communicator(int rank, int size, const std::string& axis, Device device) {
  if (size == 1) return std::make_unique<SingleRank>(axis);
  return std::make_unique<MpiCommunicator>(std::make_shared<Progress>(CommunicationSettings{}), MPI_COMM_NULL, rank,
                                           size, axis, !device.is_cpu());
}

}  // namespace deltapipe
