#include "comm/nccl_communicator.h"

#include "comm/nccl_channel.h"
#include "comm/progress.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace deltapipe {
namespace {

using nccl::Channel;
using nccl::Work;

constexpr int link_id_tag = 8192;  // of host messages that carry a link's id: tag of the link, plus this
constexpr std::size_t host_workspace_bytes = 1 << 20;  // control messages are a few numbers

ncclDataType_t type_of(const Tensor& t, const char* operation) {
  switch (t.dtype) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    default: fail<InternalError>("{}: {} cannot be summed", operation, name_of(t.dtype));
  }
}

std::size_t elements(const Tensor& t) { return static_cast<std::size_t>(t.numel()); }

class NcclCommunicator;

/// One started operation: its work on a channel, and before that, on a link whose other rank has not come yet, what it
/// will do there.
class NcclOperation final : public PendingOperation {
 public:
  NcclOperation(NcclCommunicator& owner, Device device) : owner_(owner), input_ready_(device) {}

  bool test() override;
  void wait(const Stream& stream) override;
  void release() noexcept override;

 private:
  friend class NcclCommunicator;

  NcclCommunicator& owner_;
  Channel* channel_ = nullptr;
  std::shared_ptr<Work> work_;
  // Until the link is there.
  bool waits_for_link_ = false;
  Event input_ready_;
  Transfer transfer_;
  bool sends_ = false;
};

/// Messages of one tag to or from one rank.
struct Link {
  std::unique_ptr<Channel> channel;
  ncclUniqueId id{};
  Pending id_message;
  bool id_known = false;
  std::vector<NcclOperation*> waiting;  // in the order they were started
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::shared_ptr<Progress> progress, Communicator& host, Device device);
  ~NcclCommunicator() override = default;

  void connect(std::span<const Route> routes) override;

 private:
  friend class NcclOperation;

  Pending do_exchange(const Stream& stream, std::span<const Transfer> sends, std::span<const Transfer> receives,
                      Purpose purpose, const char* operation) override;
  Pending do_all_reduce(const Stream& stream, const Tensor& x, const Tensor& scratch, Purpose purpose) override;
  Pending do_all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose) override;
  Pending do_reduce_scatter(const Stream& stream, const Tensor& whole, const Tensor& part, const Tensor& scratch,
                            Purpose purpose) override;
  void do_broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) override;
  void do_barrier(const Stream& stream, Purpose purpose) override;
  std::int64_t all_reduce_scratch(std::int64_t, DType) const override { return 0; }
  std::int64_t reduce_scatter_scratch(std::int64_t, DType) const override { return 0; }
  bool can_sum(DType dtype) const override {
    return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16;
  }

  /// Starts `call` on the axis' channel.
  template <class F>
  Pending start(const Stream& stream, Purpose purpose, const char* name, const Traffic& sent, const F& call);
  Pending start_on_link(const Stream& stream, const Transfer& transfer, bool sends, Purpose purpose, const char* name);
  Link& link_to(int peer, int tag, bool sends);
  /// Takes links a step further and starts what has waited for them.
  void advance_links();
  void advance(Link& link, int peer, int tag, bool sends);
  void start_transfer(Channel& channel, NcclOperation& operation, const Event& input_ready);
  /// Runs first messages of a channel to their end, on one byte for every rank; NCCL sets up its ways by them.
  template <class F>
  void run_first(Channel& channel, const std::string& waits_for, const F& call);
  NcclOperation& take();
  nccl::Description describe(const char* name, Purpose purpose, const std::string& waits_for,
                             const Traffic& sent = {}) const;
  std::string others() const;
  Traffic count_parts(Purpose purpose, int messages, std::size_t bytes) {
    for (int i = 0; i < messages; ++i) count_message(purpose, bytes);
    count_round(purpose);
    const auto count = static_cast<std::uint64_t>(messages);
    return {count, count * bytes, 1};
  }
  static bool is_staged(Purpose purpose) {
    return purpose == Purpose::hidden_state || purpose == Purpose::hidden_gradient;
  }

  std::shared_ptr<Progress> progress_;
  Communicator& host_;
  Device device_;
  Arena host_workspace_{"control messages", host_workspace_bytes};
  std::unique_ptr<Channel> axis_channel_;
  std::map<std::tuple<int, int, bool>, Link> links_;  // by peer, tag and whether this rank sends
  int links_unready_ = 0;
  std::vector<std::unique_ptr<NcclOperation>> operations_;  // all ever made; kept, so that a step makes none
  std::vector<NcclOperation*> idle_;
};

NcclCommunicator::NcclCommunicator(std::shared_ptr<Progress> progress, Communicator& host, Device device)
    : Communicator(host.rank(), host.size(), host.axis()),
      progress_(std::move(progress)),
      host_(host),
      device_(device) {
  ncclUniqueId id{};
  if (rank() == 0) nccl::check(ncclGetUniqueId(&id), "making an NCCL id", axis());
  host_.broadcast(Stream::cpu(), Tensor(&id, DType::u8, {sizeof id}), 0, Purpose::control);
  axis_channel_ = std::make_unique<Channel>(device_, id, size(), rank(), axis());
  const double timeout_s = progress_->settings().timeout_s;
  if (!progress_->wait_until([&] { return axis_channel_->is_ready(); })) {
    axis_channel_->abort();
    fail<CommunicationError>("NCCL's start on axis {}: rank {} has waited {:g} s for {}", axis(), rank(), timeout_s,
                             others());
  }
  // Halos and scans go between any two ranks of an axis.
  run_first(*axis_channel_, others(), [&](std::byte* scratch, ncclComm_t comm, cudaStream_t on) {
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank()) continue;
      for (const bool sends : {true, false}) {
        const ncclResult_t result = sends ? ncclSend(scratch + rank(), 1, ncclUint8, peer, comm, on)
                                          : ncclRecv(scratch + peer, 1, ncclUint8, peer, comm, on);
        if (result != ncclSuccess && result != ncclInProgress) return result;
      }
    }
    return ncclSuccess;
  });
}

template <class F>
void NcclCommunicator::run_first(Channel& channel, const std::string& waits_for, const F& call) {
  Arena memory("first messages", static_cast<std::size_t>(size()), device_);
  auto* scratch = static_cast<std::byte*>(memory.allocate(DType::u8, {size()}, "first messages").data);
  const auto work = channel.run(describe("first message", Purpose::control, waits_for), Event(device_),
                                [&](ncclComm_t comm, cudaStream_t on) { return call(scratch, comm, on); });
  const bool ended = progress_->wait_until([&] {
    channel.check();
    return work->has_ended();
  });
  if (!ended) fail<CommunicationError>("{}", work->description().silence());
}

// A route at a time, in an order that all ranks share: setting one up may have to wait for the device, where a message
// under way waits for the other rank.
void NcclCommunicator::connect(std::span<const Route> routes) {
  std::vector<Route> ordered(routes.begin(), routes.end());
  std::sort(ordered.begin(), ordered.end(), [&](const Route& a, const Route& b) {
    return std::tuple(a.tag, a.sends ? rank() : a.peer) < std::tuple(b.tag, b.sends ? rank() : b.peer);
  });
  for (const Route& r : ordered) {
    const std::string other = fmt::format("its rank {}", r.peer);
    Link& link = link_to(r.peer, r.tag, r.sends);
    const bool connected = progress_->wait_until([&] {
      advance_links();
      return link.channel != nullptr && link.channel->is_connected();
    });
    if (!connected) fail<CommunicationError>("{}", describe("connect", Purpose::control, other).silence());
    run_first(*link.channel, other, [&](std::byte* scratch, ncclComm_t comm, cudaStream_t on) {
      return r.sends ? ncclSend(scratch, 1, ncclUint8, 1, comm, on) : ncclRecv(scratch, 1, ncclUint8, 0, comm, on);
    });
  }
}

std::string NcclCommunicator::others() const {
  std::string list;
  for (int i = 0; i < size(); ++i) {
    if (i != rank()) list += (list.empty() ? "" : ", ") + std::to_string(i);
  }
  return (size() == 2 ? "its rank " : "one of its ranks ") + list;
}

nccl::Description NcclCommunicator::describe(const char* name, Purpose purpose, const std::string& waits_for,
                                             const Traffic& sent) const {
  const std::string& where = progress_->where();
  trace::Event traced;
  traced.track = trace::Track::communication;
  traced.category = axis();
  traced.name = name;
  traced.purpose = name_of(purpose);
  traced.messages = sent.messages;
  traced.bytes = sent.bytes;
  return {fmt::format("{} ({}) on axis {}{}{}: rank {}", name, name_of(purpose), axis(), where.empty() ? "" : ", ",
                      where, rank()),
          waits_for, progress_->settings().timeout_s, traced};
}

NcclOperation& NcclCommunicator::take() {
  if (idle_.empty()) {
    operations_.push_back(std::make_unique<NcclOperation>(*this, device_));
    idle_.reserve(operations_.size());
    idle_.push_back(operations_.back().get());
  }
  NcclOperation& operation = *idle_.back();
  idle_.pop_back();
  return operation;
}

template <class F>
Pending NcclCommunicator::start(const Stream& stream, Purpose purpose, const char* name, const Traffic& sent,
                                const F& call) {
  require(stream.device() == device_, "communication over NCCL: a stream of another device");
  NcclOperation& operation = take();
  Pending pending(&operation);
  operation.input_ready_.record(stream);
  operation.channel_ = axis_channel_.get();
  operation.work_ = axis_channel_->run(describe(name, purpose, others(), sent), operation.input_ready_, call);
  return pending;
}

Pending NcclCommunicator::do_all_reduce(const Stream& stream, const Tensor& x, const Tensor&, Purpose purpose) {
  if (x.device.is_cpu()) {
    host_.all_reduce_sum(Stream::cpu(), x, purpose, host_workspace_);
    return {};
  }
  constexpr const char* name = "all_reduce_sum";
  const ncclDataType_t type = type_of(x, name);
  const Traffic sent = count_parts(purpose, 2 * (size() - 1), x.bytes() / static_cast<std::size_t>(size()));
  return start(stream, purpose, name, sent, [&](ncclComm_t comm, cudaStream_t on) {
    return ncclAllReduce(x.data, x.data, elements(x), type, ncclSum, comm, on);
  });
}

Pending NcclCommunicator::do_all_gather(const Stream& stream, const Tensor& part, const Tensor& whole,
                                        Purpose purpose) {
  if (part.device.is_cpu()) return host_.start_all_gather(Stream::cpu(), part, whole, purpose);
  const Traffic sent = count_parts(purpose, size() - 1, part.bytes());
  return start(stream, purpose, "all_gather", sent, [&](ncclComm_t comm, cudaStream_t on) {
    return ncclAllGather(part.data, whole.data, part.bytes(), ncclUint8, comm, on);
  });
}

Pending NcclCommunicator::do_reduce_scatter(const Stream& stream, const Tensor& whole, const Tensor& part,
                                            const Tensor&, Purpose purpose) {
  if (part.device.is_cpu()) {
    host_.reduce_scatter_sum(Stream::cpu(), whole, part, purpose, host_workspace_);
    return {};
  }
  constexpr const char* name = "reduce_scatter_sum";
  const ncclDataType_t type = type_of(part, name);
  const Traffic sent = count_parts(purpose, size() - 1, part.bytes());
  return start(stream, purpose, name, sent, [&](ncclComm_t comm, cudaStream_t on) {
    return ncclReduceScatter(whole.data, part.data, elements(part), type, ncclSum, comm, on);
  });
}

void NcclCommunicator::do_broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) {
  if (x.device.is_cpu()) {
    host_.broadcast(Stream::cpu(), x, root, purpose);
    return;
  }
  const bool is_last = (rank() + 1) % size() == root;
  const Traffic sent = count_parts(purpose, is_last ? 0 : 1, x.bytes());
  start(stream, purpose, "broadcast", sent, [&](ncclComm_t comm, cudaStream_t on) {
    return ncclBroadcast(x.data, x.data, x.bytes(), ncclUint8, root, comm, on);
  }).wait(stream);
}

void NcclCommunicator::do_barrier(const Stream&, Purpose purpose) {
  axis_channel_->check();
  host_.barrier(Stream::cpu(), purpose);
}

Pending NcclCommunicator::do_exchange(const Stream& stream, std::span<const Transfer> sends,
                                      std::span<const Transfer> receives, Purpose purpose, const char* name) {
  const auto on_host = [](const Transfer& t) { return t.tensor.device.is_cpu(); };
  if (std::any_of(sends.begin(), sends.end(), on_host) || std::any_of(receives.begin(), receives.end(), on_host)) {
    return host_.start_exchange(Stream::cpu(), sends, receives, purpose);
  }
  advance_links();
  Traffic sent{0, 0, 1};
  for (const Transfer& t : sends) {
    count_message(purpose, t.tensor.bytes());
    ++sent.messages;
    sent.bytes += t.tensor.bytes();
  }
  count_round(purpose);
  if (is_staged(purpose) && sends.size() + receives.size() == 1) {
    return start_on_link(stream, sends.empty() ? receives.front() : sends.front(), !sends.empty(), purpose, name);
  }
  if (sends.empty() && receives.empty()) return {};
  // NCCL matches by order alone: both sides order the messages between two ranks by tag.
  std::vector<std::pair<Transfer, bool>> all;
  for (const Transfer& t : sends) all.emplace_back(t, true);
  for (const Transfer& t : receives) all.emplace_back(t, false);
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first.tag < b.first.tag; });
  return start(stream, purpose, name, sent, [&](ncclComm_t comm, cudaStream_t on) {
    for (const auto& [t, is_send] : all) {
      const ncclResult_t result = is_send ? ncclSend(t.tensor.data, t.tensor.bytes(), ncclUint8, t.peer, comm, on)
                                          : ncclRecv(t.tensor.data, t.tensor.bytes(), ncclUint8, t.peer, comm, on);
      if (result != ncclSuccess && result != ncclInProgress) return result;
    }
    return ncclSuccess;
  });
}

Link& NcclCommunicator::link_to(int peer, int tag, bool sends) {
  const auto [at, is_new] = links_.try_emplace({peer, tag, sends});
  Link& link = at->second;
  if (!is_new) return link;
  ++links_unready_;
  if (sends) nccl::check(ncclGetUniqueId(&link.id), "making an NCCL id", axis());
  const Transfer id{peer, Tensor(&link.id, DType::u8, {sizeof link.id}), link_id_tag + tag};
  const std::span<const Transfer> one(&id, 1), none;
  link.id_message = host_.start_exchange(Stream::cpu(), sends ? one : none, sends ? none : one, Purpose::control);
  return link;
}

Pending NcclCommunicator::start_on_link(const Stream& stream, const Transfer& transfer, bool sends, Purpose purpose,
                                        const char* name) {
  require(transfer.tag < max_tag - link_id_tag, "exchange: tag too large for a link");
  require(stream.device() == device_, "communication over NCCL: a stream of another device");
  Link& link = link_to(transfer.peer, transfer.tag, sends);
  NcclOperation& operation = take();
  Pending pending(&operation);
  operation.input_ready_.record(stream);
  operation.transfer_ = transfer;
  operation.sends_ = sends;
  const Traffic sent = sends ? Traffic{1, transfer.tensor.bytes(), 1} : Traffic{0, 0, 1};
  nccl::Description description = describe(name, purpose, fmt::format("its rank {}", transfer.peer), sent);
  description.traced.name = sends ? "send" : "receive";
  operation.work_ = std::make_shared<Work>(device_, std::move(description));
  operation.waits_for_link_ = true;
  link.waiting.push_back(&operation);
  advance_links();
  return pending;
}

void NcclCommunicator::advance_links() {
  if (links_unready_ == 0) {
    for (auto& [key, link] : links_) {
      if (!link.waiting.empty()) advance(link, std::get<0>(key), std::get<1>(key), std::get<2>(key));
    }
    return;
  }
  for (auto& [key, link] : links_) advance(link, std::get<0>(key), std::get<1>(key), std::get<2>(key));
}

void NcclCommunicator::advance(Link& link, int peer, int tag, bool sends) {
  if (link.channel == nullptr) {
    // The sender knows the id and need not see it arrive.
    if (!link.id_known) link.id_known = link.id_message.test() || sends;
    if (!link.id_known) return;
    link.channel = std::make_unique<Channel>(device_, link.id, 2, sends ? 0 : 1,
                                             fmt::format("{}, tag {} of rank {}", axis(), tag, peer));
  }
  if (!link.channel->is_connected()) {
    link.id_message.test();
    if (!link.channel->is_ready()) return;
    link.id_message.wait(Stream::cpu());  // at once: the other rank has used it
    --links_unready_;
  }
  for (NcclOperation* operation : std::exchange(link.waiting, {})) {
    start_transfer(*link.channel, *operation, operation->input_ready_);
  }
}

void NcclCommunicator::start_transfer(Channel& channel, NcclOperation& operation, const Event& input_ready) {
  const Tensor& t = operation.transfer_.tensor;
  operation.channel_ = &channel;
  operation.waits_for_link_ = false;
  channel.run(operation.work_, input_ready, [&](ncclComm_t comm, cudaStream_t on) {
    return operation.sends_ ? ncclSend(t.data, t.bytes(), ncclUint8, 1, comm, on)
                            : ncclRecv(t.data, t.bytes(), ncclUint8, 0, comm, on);
  });
}

bool NcclOperation::test() {
  owner_.progress_->advance_all();
  owner_.advance_links();
  if (waits_for_link_) return false;
  channel_->check();
  return work_->has_ended();
}

void NcclOperation::wait(const Stream& stream) {
  const bool is_there = owner_.progress_->wait_until([&] {
    owner_.advance_links();
    return !waits_for_link_;
  });
  if (!is_there) fail<CommunicationError>("{}", work_->description().silence());
  channel_->check();
  work_->make_wait(stream);
}

void NcclOperation::release() noexcept {
  if (waits_for_link_) {  // abandoned
    for (auto& [key, link] : owner_.links_) std::erase(link.waiting, this);
    waits_for_link_ = false;
  }
  channel_ = nullptr;
  work_.reset();  // the watchdog follows it to its end
  owner_.idle_.push_back(this);
}

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(const std::shared_ptr<Progress>& progress, Communicator& host,
                                                     Device device) {
  if (host.size() == 1) return std::make_unique<SingleRank>(host.axis());
  // Collectives' ways too are set up at the start, not by the first operation, beside which others are under way.
  setenv("NCCL_RUNTIME_CONNECT", "0", 0);
  return std::make_unique<NcclCommunicator>(progress, host, device);
}

void let_ranks_share_a_device(int world_rank) {
  setenv("NCCL_HOSTID", fmt::format("deltapipe rank {}", world_rank).c_str(), 1);
}

}  // namespace deltapipe
