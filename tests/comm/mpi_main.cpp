// main of the distributed tests, run by mpirun: rank 0 prints as usual, other ranks print failures alone, and every
// rank fails when one does.
#include "tests/comm/testing.h"

#include <cstdio>
#include <string>

namespace deltapipe::testing {
namespace {

MpiRuntime* current_runtime = nullptr;

class FailurePrinter final : public ::testing::EmptyTestEventListener {
 public:
  explicit FailurePrinter(int rank) : rank_(rank) {}

 private:
  void OnTestStart(const ::testing::TestInfo& test) override {
    test_ = std::string(test.test_suite_name()) + "." + test.name();
  }
  // GoogleTest holds its lock here: asking it for the current test would wait for ever.
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::fprintf(stderr, "[rank %d] %s %s:%d: %s\n", rank_, test_.c_str(),
                 result.file_name() != nullptr ? result.file_name() : "", result.line_number(), result.message());
  }
  void OnTestEnd(const ::testing::TestInfo&) override { test_.clear(); }

  std::string test_;
  int rank_;
};

int run_tests(MpiRuntime& runtime) {
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (runtime.rank() != 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailurePrinter(runtime.rank()));
  }
  float failures = RUN_ALL_TESTS() == 0 ? 0.0f : 1.0f;
  Arena workspace("failures", 1 << 16);
  runtime.world().all_reduce_sum(Stream::cpu(), Tensor(&failures, DType::f32, {1}), Purpose::control, workspace);
  if (runtime.rank() == 0 && failures > 0) std::fprintf(stderr, "failed on %.0f rank(s)\n", failures);
  return failures > 0 ? 1 : 0;
}

}  // namespace

MpiRuntime& runtime() { return *current_runtime; }

}  // namespace deltapipe::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  try {
    deltapipe::CommunicationSettings settings;
    settings.timeout_s = 200;  // far above any wait of a test on a busy machine, below CTest's limit
    deltapipe::MpiRuntime runtime(settings);
    deltapipe::testing::current_runtime = &runtime;
    return deltapipe::testing::run_tests(runtime);
  } catch (const deltapipe::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    deltapipe::MpiRuntime::abort_all(e.exit_code());
  }
}
