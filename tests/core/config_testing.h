// What the tests of the configuration share.
#pragma once

#include <algorithm>
#include <string>

namespace deltapipe::config_testing {

// A whole recipe that uses every kind of value.
inline const std::string recipe = R"([run]
name = "afm"
seed = 7
device = "cuda"

[teacher]
path = "models/afm"

[student.kda]
gate_lower_bound = -5
conv_init = "normal"

[[optimizer.group]]
pattern = "A_log|dt_bias"
decay = false

[[optimizer.group]]
pattern = "norm"
learning_rate_factor = 0.5

[[stage]]
name = "align"
steps = 10
sequence_length = 512
learning_rate = 1e-3
loss = { mixer_mse = 1 }

[[stage]]
name = "distill"
tokens = 1_000_001
sequence_length = 1000
batch_sequences = 12
microbatch_sequences = 4
learning_rate = 1e-5
frozen = [
  'embed_tokens',
  '^lm_head\.',
]
hidden_layers = [[0, 0], [1, 3]]
[stage.loss]
ce = 0.2
kl = 0.8

[eval.needle]
lengths = [1024, 4096]
)";

/// What every error has to be: one line, not empty and not endless, whatever the input held.
inline bool is_one_line(const std::string& message) {
  return !message.empty() && message.size() < 1500 &&
         std::none_of(message.begin(), message.end(), [](unsigned char c) { return c < 0x20; });
}

}  // namespace deltapipe::config_testing
