#include "train/lr_schedule.h"

#include "core/error.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace deltapipe {
namespace {

constexpr LrKind every_kind[] = {LrKind::constant, LrKind::cosine, LrKind::linear};

TEST(LrSchedule, WarmUpRisesFromPeakOverStepsToPeak) {
  for (const LrKind kind : every_kind) {
    // round(0.025 * 200) = 5 steps
    for (int step = 0; step < 5; ++step) {
      EXPECT_DOUBLE_EQ(learning_rate(kind, step, 200, 0.025, 1e-3, 1e-5), 1e-3 * (step + 1) / 5) << step;
    }
    EXPECT_EQ(learning_rate(kind, 4, 200, 0.025, 1e-3, 1e-5), 1e-3);
  }
  // round(0.25 * 10) = 3 (halves go up), round(0.24 * 10) = 2
  EXPECT_DOUBLE_EQ(learning_rate(LrKind::linear, 0, 10, 0.25, 3.0, 0.0), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(LrKind::linear, 0, 10, 0.24, 3.0, 0.0), 1.5);
}

TEST(LrSchedule, DecayReachesFinalOnTheLastStep) {
  for (const double fraction : {0.0, 0.1, 0.5, 0.9}) {
    EXPECT_EQ(learning_rate(LrKind::cosine, 99, 100, fraction, 1e-3, 1e-5), 1e-5);
    EXPECT_EQ(learning_rate(LrKind::linear, 99, 100, fraction, 1e-3, 1e-5), 1e-5);
    EXPECT_EQ(learning_rate(LrKind::constant, 99, 100, fraction, 1e-3, 1e-5), 1e-3);
    EXPECT_GT(learning_rate(LrKind::linear, 98, 100, fraction, 1e-3, 1e-5), 1e-5);
  }
}

TEST(LrSchedule, ValuesBetween) {
  // No warm-up: step 0 has the peak, ten steps of decay to step 10.
  EXPECT_EQ(learning_rate(LrKind::linear, 0, 11, 0.0, 1.0, 0.2), 1.0);
  EXPECT_NEAR(learning_rate(LrKind::linear, 3, 11, 0.0, 1.0, 0.2), 1 - 0.3 * 0.8, 1e-15);
  EXPECT_EQ(learning_rate(LrKind::cosine, 0, 11, 0.0, 1.0, 0.2), 1.0);
  EXPECT_NEAR(learning_rate(LrKind::cosine, 5, 11, 0.0, 1.0, 0.2), 0.6, 1e-15);
  EXPECT_NEAR(learning_rate(LrKind::cosine, 2, 11, 0.0, 1.0, 0.2), 0.2 + 0.4 * (1 + std::cos(0.2 * std::numbers::pi)),
              1e-15);
  // Four steps of warm-up: step 3 has the peak, eight steps of decay to step 11.
  EXPECT_NEAR(learning_rate(LrKind::linear, 4, 12, 1.0 / 3, 1.0, 0.0), 1 - 1.0 / 8, 1e-15);
  EXPECT_NEAR(learning_rate(LrKind::linear, 10, 12, 1.0 / 3, 1.0, 0.0), 1.0 / 8, 1e-15);
  EXPECT_NEAR(learning_rate(LrKind::cosine, 7, 12, 1.0 / 3, 1.0, 0.0), 0.5, 1e-15);
}

TEST(LrSchedule, RisesThenFallsWithinItsBounds) {
  for (const LrKind kind : every_kind) {
    for (const double fraction : {0.0, 0.013, 0.3, 1.0}) {
      for (const int total : {1, 2, 3, 7, 1000}) {
        const auto warmup = std::llround(fraction * total);
        for (int step = 0; step < total; ++step) {
          const double rate = learning_rate(kind, step, total, fraction, 0.5, 0.01);
          EXPECT_LE(rate, 0.5);
          EXPECT_GE(rate, step < warmup ? 0.5 / static_cast<double>(warmup) : 0.01);
          if (step == 0) continue;
          const double before = learning_rate(kind, step - 1, total, fraction, 0.5, 0.01);
          if (step < warmup) {
            EXPECT_GT(rate, before) << step;
          } else {
            EXPECT_LE(rate, before) << step;
          }
        }
      }
    }
  }
}

TEST(LrSchedule, Edges) {
  for (const LrKind kind : every_kind) {
    // one step in all, with and without warm-up
    EXPECT_EQ(learning_rate(kind, 0, 1, 0.0, 1e-3, 1e-5), 1e-3);
    EXPECT_EQ(learning_rate(kind, 0, 1, 1.0, 1e-3, 1e-5), 1e-3);
    // warm-up to the end
    EXPECT_EQ(learning_rate(kind, 0, 10, 1.0, 1e-3, 1e-5), 1e-4);
    EXPECT_EQ(learning_rate(kind, 9, 10, 1.0, 1e-3, 1e-5), 1e-3);
    // a fraction that rounds to no step
    EXPECT_EQ(learning_rate(kind, 0, 10, 0.04, 1e-3, 1e-5), 1e-3);
    // past the end
    for (const double fraction : {0.0, 0.3, 1.0}) {
      EXPECT_EQ(learning_rate(kind, 500, 10, fraction, 1e-3, 1e-5), learning_rate(kind, 9, 10, fraction, 1e-3, 1e-5));
    }
  }
  // a rising "decay" is allowed
  EXPECT_DOUBLE_EQ(learning_rate(LrKind::linear, 1, 3, 0.0, 1.0, 2.0), 1.5);
}

TEST(LrSchedule, BrokenContractsThrow) {
  EXPECT_THROW(learning_rate(LrKind::linear, -1, 10, 0.0, 1.0, 0.0), InternalError);
  EXPECT_THROW(learning_rate(LrKind::linear, 0, 0, 0.0, 1.0, 0.0), InternalError);
  EXPECT_THROW(learning_rate(LrKind::linear, 0, 10, -0.1, 1.0, 0.0), InternalError);
  EXPECT_THROW(learning_rate(LrKind::linear, 0, 10, 1.1, 1.0, 0.0), InternalError);
  EXPECT_THROW(learning_rate(LrKind::linear, 0, 10, std::nan(""), 1.0, 0.0), InternalError);
}

}  // namespace
}  // namespace deltapipe
