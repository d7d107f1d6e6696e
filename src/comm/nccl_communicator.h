// Communicators over NCCL, for device memory. Tensors in host memory, of control messages, go over MPI as before.
//
// Streams. Every communicator has a stream of its own. An operation starts there after what the caller's stream had
// been given at its start, and Pending::wait makes a stream wait for it without waiting on the host: compute that is
// given to the caller's stream in between runs beside it.
//
// Links. Operations of one NCCL communicator run in the order they are started, so a receive whose sender is late would
// hold up what comes after. Where ranks are not in step, between the stages of a pipeline (Purpose::hidden_state and
// hidden_gradient), each peer, direction and tag therefore has a communicator of two ranks, made by connect() or at its
// first message; wait then waits on the host until the other rank has come to its own first. All other exchanges are
// one NCCL group on the axis' communicator: the ranks start them in one order, and messages between two ranks match by
// tag within it.
//
// Sums. float32, float64 and bfloat16 (rounded at every addition); in NCCL's order, which depends on the number of
// ranks, the size and the machine's topology alone: the same bits on every run and on every rank.
//
// Faults. A watchdog thread follows the operations under way. One that has not ended timeout_s after its input was
// ready, or that NCCL reports as failed, aborts its communicator, which ends NCCL's kernels on the device; the next
// call on the communicator throws a CommunicationError that names operation, purpose, axis and the ranks waited for.
//
// Traffic counts what a ring sends: N - 1 parts for a gather or reduce-scatter, twice that for an all-reduce, the whole
// for a broadcast by every rank but the last; 1 round each. Host memory and barriers count on the MPI communicator.
#pragma once

#include "comm/communicator.h"

#include <memory>

namespace deltapipe {

class Progress;

/// The ranks of `host`, a communicator over MPI that outlives the new one, on `device`, which is this thread's current
/// one. Collective. One rank alone is a SingleRank. Throws CommunicationError when NCCL refuses or a rank stays away.
std::unique_ptr<Communicator> make_nccl_communicator(const std::shared_ptr<Progress>& progress, Communicator& host,
                                                     Device device);

/// For tests: lets several ranks use one GPU, which NCCL refuses unless each looks like a host of its own. They talk
/// over sockets then. Before the first communicator.
void let_ranks_share_a_device(int world_rank);

}  // namespace deltapipe
