#include "distill/student_init.h"

#include "core/error.h"
#include "core/host_staging.h"
#include "core/log.h"
#include "core/parallel.h"
#include "core/random.h"
#include "kernels/elementwise.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace deltapipe {
namespace {

/// A value that lives in host memory in the accumulation dtype on its way to a parameter.
class Staging {
 public:
  Tensor make(DType dtype, const Shape& shape) {
    bytes_.resize(static_cast<std::size_t>(shape.numel()) * size_of(dtype));
    return {bytes_.data(), dtype, shape};
  }

 private:
  std::vector<std::byte> bytes_;
};

template <class F>
void fill(const Tensor& t, const F& value) {
  constexpr std::int64_t block = 1 << 16;  // elements a task
  const auto fill_as = [&]<class T>(T* p) {
    parallel_blocks(t.numel(), block, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) p[i] = static_cast<T>(value(i));
    });
  };
  if (t.dtype == DType::f64) {
    fill_as(t.as<double>());
  } else {
    fill_as(t.as<float>());
  }
}

void fill_normal(const Tensor& t, std::uint64_t seed, std::string_view name, double std) {
  const RandomStream r(seed, name);
  fill(t, [&](std::int64_t i) { return std * r.normal(static_cast<std::uint64_t>(i)); });
}

bool ends_with_any(std::string_view name, std::initializer_list<std::string_view> tails) {
  return std::any_of(tails.begin(), tails.end(), [&](std::string_view t) { return name.ends_with(t); });
}

void fill_fresh(const Tensor& t, const ParameterSpec& spec, const StudentConfig& config, std::uint64_t seed,
                double std) {
  const std::string_view name = spec.name;
  const RandomStream r(seed, name);
  const auto uniform = [&](std::int64_t i) { return r.uniform(static_cast<std::uint64_t>(i)); };
  if (name.ends_with(".A_log")) {
    fill(t, [&](std::int64_t i) { return std::log(1.0 + 15.0 * uniform(i)); });
  } else if (name.ends_with(".dt_bias")) {
    fill(t, [&](std::int64_t i) {
      const double low = std::log(0.001), high = std::log(0.1);
      const double dt = std::max(std::exp(low + (high - low) * uniform(i)), 1e-4);
      return dt + std::log(-std::expm1(-dt));  // the inverse of softplus
    });
  } else if (name.ends_with(".bias")) {
    fill(t, [](std::int64_t) { return 0.0; });
  } else if (ends_with_any(name, {"norm.weight"})) {
    fill(t, [](std::int64_t) { return 1.0; });
  } else if (name.ends_with("conv1d.weight") && config.kda.conv_init == ConvInit::identity) {
    const std::int64_t width = spec.shape[-1];
    fill(t, [&](std::int64_t i) { return i % width == width - 1 ? 1.0 : 0.0; });  // the newest token's tap
  } else {
    fill_normal(t, seed, name, std);
  }
}

/// Rows of `from` [from_heads * d, D] repeated so that head h of `to` [to_heads * d, D] is head h / (to / from).
void repeat_heads(const Tensor& from, std::int64_t from_heads, const Tensor& to, std::int64_t to_heads) {
  const std::size_t bytes_a_head = from.bytes() / static_cast<std::size_t>(from_heads);
  for (std::int64_t h = 0; h < to_heads; ++h) {
    const std::int64_t source = h / (to_heads / from_heads);
    std::memcpy(static_cast<std::byte*>(to.data) + static_cast<std::size_t>(h) * bytes_a_head,
                static_cast<const std::byte*>(from.data) + static_cast<std::size_t>(source) * bytes_a_head,
                bytes_a_head);
  }
}

constexpr double fresh_std = 0.02;  // of matrices that the teacher does not have

}  // namespace

ModelSpec make_student_spec(const StudentConfig& config, const ModelSpec* teacher, std::int64_t data_vocabulary) {
  ModelSpec s;
  std::int64_t layers = 0;
  if (config.init == StudentInit::teacher) {
    require(teacher != nullptr, "make_student_spec: no teacher");
    s = *teacher;
    layers = teacher->layers();
    if (config.attention.kv_heads != 0) {
      if (config.attention.kv_heads % teacher->kv_heads != 0 || teacher->heads % config.attention.kv_heads != 0) {
        fail<ConfigError>("student.attention.kv_heads is {}, must be a multiple of the teacher's {} that divides {}",
                          config.attention.kv_heads, teacher->kv_heads, teacher->heads);
      }
      s.kv_heads = config.attention.kv_heads;
    }
  } else {
    const StudentModelConfig& m = config.model;
    s.vocabulary = m.vocabulary != 0 ? m.vocabulary : data_vocabulary;
    s.hidden = m.hidden;
    s.intermediate = m.intermediate;
    s.heads = m.heads;
    s.kv_heads = m.kv_heads;
    s.head_dim = m.head_dim;
    s.max_positions = m.max_positions;
    s.norm_eps = m.norm_eps;
    s.tied_embeddings = m.tied_embeddings;
    s.mlp = m.type == ModelType::llama ? Mlp::gated_silu : Mlp::squared_relu;
    s.rope.theta = m.rope_theta;
    s.rope.factor = m.rope_factor;
    s.rope.original_max_positions = m.rope_original_max_positions;
    s.rope.beta_fast = m.rope_beta_fast;
    s.rope.beta_slow = m.rope_beta_slow;
    layers = m.layers;
    s.mixers.assign(static_cast<std::size_t>(layers), Mixer::rope);
    if (m.type != ModelType::arcee_kda) {
      s.model_type = name_of(m.type);
      s.validate();
      return s;
    }
  }
  s.model_type = "arcee_kda";
  s.mixers.clear();
  for (std::int64_t l = 0; l < layers; ++l) {
    s.mixers.push_back(mixer_from(config.mixers[static_cast<std::size_t>(l) % config.mixers.size()]));
  }
  s.kda.heads = config.kda.heads != 0 ? config.kda.heads : s.heads;
  s.kda.head_dim = config.kda.head_dim != 0 ? config.kda.head_dim : s.head_dim;
  s.kda.conv_width = config.kda.conv_width;
  s.kda.gate_rank = config.kda.gate_rank != 0 ? config.kda.gate_rank : s.kda.head_dim;
  s.kda.gate_lower_bound = config.kda.gate_lower_bound;
  if (!s.has(Mixer::rope)) s.rope = RopeSpec();  // nothing rotates: the teacher's settings would only mislead
  s.validate();
  return s;
}

void init_student_from_teacher(const StudentConfig& config, std::uint64_t seed, const ModelSpec& teacher,
                               const LoadWeight& load, const ModelSpec& student, ParameterTable& parameters,
                               const Stream& stream) {
  std::unordered_map<std::string, ParameterSpec> theirs;
  for (const ParameterSpec& p : parameters_of(teacher)) theirs.emplace(p.name, p);
  const bool heads_match = student.kda.heads == teacher.heads && student.kda.head_dim == teacher.head_dim;
  if (student.has(Mixer::kda) && !heads_match) {
    log::info("KDA has {} heads of {}, the teacher {} of {}: q, k, v and o of KDA layers start fresh",
              student.kda.heads, student.kda.head_dim, teacher.heads, teacher.head_dim);
  }
  Staging ours_memory, theirs_memory;
  HostStaging converted;
  for (Parameter& p : parameters.all()) {
    const ParameterSpec& spec = p.spec;
    const Tensor value = ours_memory.make(accumulation_dtype(p.value.dtype), spec.shape);
    const auto found = theirs.find(spec.name);
    const bool is_kda = spec.layer >= 0 && spec.layer < student.layers() &&
                        student.mixers[static_cast<std::size_t>(spec.layer)] == Mixer::kda;
    const bool is_key_or_value = ends_with_any(spec.name, {".k_proj.weight", ".v_proj.weight"});
    const bool is_projection =
        is_key_or_value || ends_with_any(spec.name, {"self_attn.q_proj.weight", "self_attn.o_proj.weight"});
    const bool usable = found != theirs.end() && !(is_kda && is_projection && !heads_match);
    if (usable && is_key_or_value) {
      const Tensor source = theirs_memory.make(value.dtype, found->second.shape);
      load(found->second, source);
      repeat_heads(source, teacher.kv_heads, value, is_kda ? student.kda.heads : student.kv_heads);
    } else if (usable && found->second.shape == spec.shape) {
      load(found->second, value);
    } else {
      fill_fresh(value, spec, config, seed, fresh_std);
    }
    converted.write(stream, p.value, [&](const Tensor& host) { kernels::copy_cast(Stream::cpu(), value, host); });
  }
}

void init_student_randomly(const StudentConfig& config, std::uint64_t seed, ParameterTable& parameters,
                           const Stream& stream) {
  for (Parameter& p : parameters.all()) init_freshly(p, config, seed, stream);
}

void init_freshly(Parameter& parameter, const StudentConfig& config, std::uint64_t seed, const Stream& stream) {
  Staging memory;
  const Tensor value = memory.make(accumulation_dtype(parameter.value.dtype), parameter.spec.shape);
  fill_fresh(value, parameter.spec, config, seed, config.model.init_std);
  HostStaging().write(stream, parameter.value,
                      [&](const Tensor& host) { kernels::copy_cast(Stream::cpu(), value, host); });
}

}  // namespace deltapipe
