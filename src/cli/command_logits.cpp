#include "cli/commands.h"
#include "cli/loaded_model.h"
#include "cli/options.h"
#include "core/file.h"
#include "model/inference.h"

#include <fmt/format.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

/// NumPy's .npy format, version 1.0, little-endian float32 or float64.
std::string npy(const std::vector<std::byte>& values, DType dtype, std::int64_t rows, std::int64_t columns) {
  std::string header = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}, {}), }}",
                                   dtype == DType::f64 ? "<f8" : "<f4", rows, columns);
  const std::size_t fixed = 10;                           // magic, version and header length
  header.append(63 - (fixed + header.size()) % 64, ' ');  // data begins at a multiple of 64
  header += '\n';
  std::string file("\x93NUMPY\x01\x00", 8);
  file += static_cast<char>(header.size() & 0xff);
  file += static_cast<char>(header.size() >> 8);
  file += header;
  file.append(reinterpret_cast<const char*>(values.data()), values.size());
  return file;
}

struct Options {
  std::string model, out;
  ComputationOptions computation;
  TokenOptions tokens;
};

void write_logits(const Options& options) {
  const std::vector<std::int64_t> tokens = options.tokens.read();
  const Computation how = options.computation.choose();
  const DType dtype = accumulation_dtype(how.dtype);
  WeightSource source(options.model);
  const PromptBatch prompt(tokens, source.spec().vocabulary);
  const std::int64_t rows = std::ssize(tokens), columns = source.spec().vocabulary;
  std::vector<std::byte> values(static_cast<std::size_t>(rows * columns) * size_of(dtype));
  with_models(source, nullptr, how, [&](const Context& c, ModelSet& models, ArenaSet&) {
    const auto scope = c.workspace.scope();
    for_each_logits(c, models.student(), prompt.batch(c), 512, [&](std::int64_t first, const Tensor& logits) {
      if (c.stream.is_dry()) return;
      const HostLogits here(c.stream, logits);
      std::memcpy(values.data() + static_cast<std::size_t>(first * columns) * size_of(dtype), here.tensor().data,
                  here.tensor().bytes());
    });
  });
  write_file_atomically(options.out, npy(values, dtype, rows, columns));
}

}  // namespace

void add_logits_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("logits", "write a model's logits [tokens, vocabulary] as a NumPy file");
  auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "Hugging Face folder or checkpoint")->required()->type_name("FOLDER");
  command->add_option("--out", options->out, "file to write (.npy)")->required()->type_name("FILE");
  options->computation.add_to(*command);
  options->tokens.add_to(*command);
  command->callback([options] { write_logits(*options); });
}

}  // namespace deltapipe
