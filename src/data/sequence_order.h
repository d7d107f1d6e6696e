// The order in which sequences are visited: a pseudo-random permutation that is computed, not stored. Any rank can ask
// for any position of any epoch, so that resuming needs no replay and the order does not depend on the mesh.
//
// A Feistel network (Luby & Rackoff, "How to Construct Pseudorandom Permutations from Pseudorandom Functions", 1988)
// whose round function is Philox permutes the smallest power of four that holds n; positions that leave [0, n) are sent
// through again until they fall inside (cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002),
// fewer than four times on average.
#pragma once

#include <cstdint>

namespace deltapipe {

/// For fixed (seed, epoch) a bijection of [0, n) onto itself; another epoch or seed gives an unrelated one.
/// Throws InternalError unless position < n.
std::uint64_t sequence_order(std::uint64_t seed, std::uint64_t epoch, std::uint64_t position, std::uint64_t n);

}  // namespace deltapipe
