#include "model/spec.h"

#include <gtest/gtest.h>

namespace deltapipe {
namespace {

ModelSpec afm_teacher() {
  ModelSpec s;
  s.model_type = "arcee";
  s.vocabulary = 128004;
  s.hidden = 2560;
  s.intermediate = 18432;
  s.heads = 20;
  s.kv_heads = 4;
  s.head_dim = 128;
  s.max_positions = 65536;
  s.mixers.assign(36, Mixer::rope);
  return s;
}

// The published parameter counts of AFM-4.5B-Base and its KDA students.
TEST(ModelSpec, CountsTheParametersOfPublishedModels) {
  ModelSpec s = afm_teacher();
  EXPECT_EQ(count_parameters(s), 4'619'184'640);
  s.model_type = "arcee_kda";
  s.kda = {.heads = 20, .head_dim = 128, .conv_width = 4, .gate_rank = 128};
  for (std::size_t l = 0; l < 36; ++l) s.mixers[l] = l % 4 == 3 ? Mixer::nope : Mixer::kda;
  EXPECT_EQ(count_parameters(s), 4'940'043'676);
  s.kv_heads = 20;
  EXPECT_EQ(count_parameters(s), 5'034'415'516);
  std::int64_t kda = 0;
  for (const ParameterSpec& p : layer_parameters_of(s, 0)) {
    if (p.name.find("self_attn") != std::string::npos) kda += p.shape.numel();
  }
  EXPECT_EQ(kda, 27'612'308);
}

TEST(ModelSpec, RefusesImpossibleValues) {
  ModelSpec s = afm_teacher();
  s.validate();
  s.kv_heads = 3;
  EXPECT_THROW(s.validate(), ConfigError);
  s = afm_teacher();
  s.mixers[0] = Mixer::kda;
  EXPECT_THROW(s.validate(), ConfigError);  // no KDA sizes
}

}  // namespace
}  // namespace deltapipe
