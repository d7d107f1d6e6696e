// What the parts of core/hdf5.cpp share: the lock, the errors, and owners of library handles. Nothing else includes it.
#pragma once

#include "core/hdf5.h"

#include <hdf5.h>

#include <mutex>
#include <string>

namespace deltapipe::hdf5 {

/// Held for the length of every use of the library: one thread at a time, and no error text on the console.
class Call {
 public:
  Call();

 private:
  std::lock_guard<std::recursive_mutex> hold_;
};

/// What the failed call was for: a failure without a system error is the file's fault when reading, ours when writing.
enum class Access { read, write };

/// Throws for the call that has just failed. `doing` reads like "cannot open FILE".
[[noreturn]] void fail_hdf5(const std::string& doing, Access access);

template <class Id>
Id check(Id result, const std::string& doing, Access access) {
  if (result < 0) fail_hdf5(doing, access);
  return result;
}

inline Handle own_space(hid_t id) { return {id, H5Sclose}; }
inline Handle own_type(hid_t id) { return {id, H5Tclose}; }
inline Handle own_properties(hid_t id) { return {id, H5Pclose}; }

}  // namespace deltapipe::hdf5
