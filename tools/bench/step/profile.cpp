#include "tools/bench/step/profile.h"

#include "core/device_memory.h"
#include "core/error.h"
#include "kernels/settings.h"

namespace deltapipe::bench {
namespace {

Profile* active = nullptr;

}  // namespace

Profile::Profile(pipeline::Executor& executor, const Stream& stream) : executor_(executor), stream_(stream) {
  require(active == nullptr, "Profile: another one is active");
  active = this;
  kernels::call_observer = &Profile::on_call;
  executor_.observer = [this](const pipeline::Task& task, bool begins) {
    synchronize(stream_);
    if (begins) {
      task_begin_ = Clock::now();
      return;
    }
    Share& share = tasks_[std::string(pipeline::name_of(task.kind))];
    share.seconds += std::chrono::duration<double>(Clock::now() - task_begin_).count();
    ++share.calls;
  };
}

Profile::~Profile() {
  kernels::call_observer = nullptr;
  executor_.observer = nullptr;
  active = nullptr;
}

void Profile::on_call(const Stream& stream, const char* name, bool begins) {
  synchronize(stream);
  if (begins) {
    active->call_begin_ = Clock::now();
    return;
  }
  Share& share = active->operations_[name];
  share.seconds += std::chrono::duration<double>(Clock::now() - active->call_begin_).count();
  ++share.calls;
}

}  // namespace deltapipe::bench
