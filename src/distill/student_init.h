// The student before training: its shape from the settings and the teacher, and its first weights.
#pragma once

#include "core/config.h"
#include "core/stream.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <cstdint>
#include <functional>

namespace deltapipe {

/// Shape of the student for student.init = teacher or random. `teacher` is null for random; `data_vocabulary` fills
/// student.model.vocabulary = 0. Throws ConfigError.
ModelSpec make_student_spec(const StudentConfig& config, const ModelSpec* teacher, std::int64_t data_vocabulary);

/// Copies one of the teacher's weights into host memory of the accumulation dtype.
using LoadWeight = std::function<void(const ParameterSpec&, const Tensor&)>;

/// First weights of a student derived from its teacher:
///  - weights that both have under one name and shape are copied (embeddings, norms, MLPs, head);
///  - KDA layers take the teacher's q, k, v and o projections, key/value heads repeated so that KDA head h holds the
///    teacher's key/value head of its query head h; full layers likewise when they have more key/value heads;
///  - what the teacher lacks is fresh: A_log = log U(1, 16); dt_bias = softplus^-1(dt), dt log-uniform in [0.001, 0.1];
///    g_proj bias 0; o_norm 1; convolutions by student.kda.conv_init; other matrices N(0, 0.02), as in
///    flash-linear-attention. Projections whose heads do not match the teacher's are fresh too.
/// Every value is a function of (seed, parameter name) alone. `stream` is of the parameters' device.
void init_student_from_teacher(const StudentConfig& config, std::uint64_t seed, const ModelSpec& teacher,
                               const LoadWeight& load, const ModelSpec& student, ParameterTable& parameters,
                               const Stream& stream = Stream::cpu());

/// First weights of a model that learns from nothing: norms 1, matrices N(0, student.model.init_std), KDA's own as
/// above.
void init_student_randomly(const StudentConfig& config, std::uint64_t seed, ParameterTable& parameters,
                           const Stream& stream = Stream::cpu());

/// One such weight.
void init_freshly(Parameter& parameter, const StudentConfig& config, std::uint64_t seed, const Stream& stream);

}  // namespace deltapipe
