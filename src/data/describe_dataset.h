// A token dataset for people.
#pragma once

#include <filesystem>
#include <string>

namespace deltapipe {

/// A small table: documents, tokens, longest and mean document, vocabulary, special ids, hash and the first tokens (as
/// text when they are bytes). Throws as TokenDataset.
std::string describe_dataset(const std::filesystem::path& path);

}  // namespace deltapipe
