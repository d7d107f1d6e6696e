// Communicators over MPI. Every operation is made of non-blocking sends and receives between pairs of ranks, so that a
// wait can be given up and the silent ranks named, and sums are taken in rank order. mpi.h stays in the .cpp file.
//
// Messages and bytes of one rank of N, for tensors of `bytes` bytes (also what the traffic counters show):
//   all_gather of a part            N - 1 messages of the part
//   reduce_scatter_sum to a part    (N - 1) ceil(part / block) messages, (N - 1) parts in all; a block is the share of
//                                   CommunicationSettings::reduce_bytes that each of N - 1 peers has
//   all_reduce_sum, <= 16 KiB       N - 1 messages of the whole, one round, summed by everybody
//   all_reduce_sum, larger          reduce_scatter_sum, then all_gather, of parts of ceil(elements / N) elements
//   broadcast                       a binomial tree: the whole to at most ceil(log2 N) ranks
//   barrier                         dissemination: ceil(log2 N) empty messages
#pragma once

#include "comm/communicator.h"

#include <memory>
#include <string>

namespace deltapipe {

class Progress;

/// MPI has been started and not ended.
bool mpi_is_up();

/// Collective over MPI's world, of which all ranks call it. One rank alone is a SingleRank.
std::unique_ptr<Communicator> split_world(const std::shared_ptr<Progress>& progress, int color, int key,
                                          const std::string& axis);

/// Rank `rank` of `size` ranks that do not exist: for dry streams alone, on which it takes the same workspace as the
/// real one on `device` (over NCCL: none); anything else throws InternalError.
std::unique_ptr<Communicator> planned_communicator(int rank, int size, const std::string& axis, Device device = {});

}  // namespace deltapipe
