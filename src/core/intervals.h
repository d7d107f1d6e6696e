// Sets of moments, as stretches of time: what overlaps counts once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace deltapipe {

/// From `begin` up to, but without, `end`; in any unit.
struct Interval {
  std::int64_t begin = 0, end = 0;
  friend bool operator==(const Interval&, const Interval&) = default;
};
using Intervals = std::vector<Interval>;

/// The same moments as stretches that neither overlap nor touch, in order; empty ones go. The functions below take and
/// return such.
inline Intervals united(Intervals list) {
  std::erase_if(list, [](const Interval& i) { return i.end <= i.begin; });
  std::sort(list.begin(), list.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  Intervals out;
  for (const Interval& i : list) {
    if (!out.empty() && i.begin <= out.back().end) {
      out.back().end = std::max(out.back().end, i.end);
    } else {
      out.push_back(i);
    }
  }
  return out;
}

/// Moments of both.
inline Intervals common(const Intervals& a, const Intervals& b) {
  Intervals out;
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const Interval both{std::max(a[i].begin, b[j].begin), std::min(a[i].end, b[j].end)};
    if (both.begin < both.end) out.push_back(both);
    (a[i].end < b[j].end ? i : j) += 1;
  }
  return out;
}

/// Moments of `a` that are not of `b`.
inline Intervals without(const Intervals& a, const Intervals& b) {
  Intervals out;
  std::size_t first = 0;  // of b that may end after the present one of a begins
  for (const Interval& i : a) {
    while (first < b.size() && b[first].end <= i.begin) ++first;
    std::int64_t at = i.begin;
    for (std::size_t j = first; j < b.size() && b[j].begin < i.end; ++j) {
      if (b[j].begin > at) out.push_back({at, b[j].begin});
      at = std::max(at, b[j].end);
    }
    if (at < i.end) out.push_back({at, i.end});
  }
  return out;
}

inline std::int64_t length(const Intervals& list) {
  std::int64_t sum = 0;
  for (const Interval& i : list) sum += i.end - i.begin;
  return sum;
}

}  // namespace deltapipe
