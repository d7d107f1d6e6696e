#include "core/arena.h"

#include <gtest/gtest.h>

namespace deltapipe {
namespace {

TEST(Arena, MeasuresWhatARealRunNeeds) {
  const auto use = [](Arena& a) {
    a.allocate(DType::f32, {3, 5}, "a");
    {
      const auto scope = a.scope();
      a.allocate(DType::f64, {100}, "b");
    }
    a.allocate(DType::bf16, {7}, "c");
  };
  Arena measuring = Arena::measuring("m");
  use(measuring);
  EXPECT_EQ(measuring.peak(), 256u + 1024u);
  EXPECT_EQ(measuring.used(), 512u);
  Arena real("r", measuring.peak());
  use(real);
  EXPECT_EQ(real.peak(), measuring.peak());
}

TEST(Arena, NamesTheTensorThatDoesNotFit) {
  Arena a("workspace", 1024);
  a.allocate(DType::f32, {200}, "first");
  try {
    a.allocate(DType::f32, {200}, "logits");
    FAIL();
  } catch (const MemoryError& e) {
    EXPECT_NE(std::string(e.what()).find("logits"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("workspace"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace deltapipe
