#include "data/token_dataset.h"

#include "core/error.h"
#include "core/random.h"
#include "tests/data/testing.h"

#include <unistd.h>

#include <functional>
#include <optional>

namespace deltapipe {
namespace {

using testing::Documents;
using testing::error_of;
using testing::TemporaryFolder;

const TokenDatasetInfo tiny{"tiny", "0123456789abcdef", 50, 0, 1};

TEST(TokenDataset, GivesBackWhatWasWritten) {
  const TemporaryFolder folder;
  const Documents documents = testing::random_documents(1, 700, 90, 50);
  testing::write_dataset(folder / "a.h5", tiny, documents);
  EXPECT_EQ(folder.names(), std::set<std::string>{"a.h5"});

  const TokenDataset dataset(folder / "a.h5");
  EXPECT_TRUE(dataset.is_mapped());
  EXPECT_EQ(dataset.documents(), 700u);
  EXPECT_EQ(dataset.vocabulary(), 50u);
  EXPECT_EQ(dataset.bos(), 0);
  EXPECT_EQ(dataset.eos(), 1);
  EXPECT_EQ(dataset.tokenizer_hash(), "0123456789abcdef");
  EXPECT_EQ(dataset.info().tokenizer, "tiny");
  EXPECT_EQ(testing::read_documents(dataset), documents);
  const auto all = testing::join(documents);
  ASSERT_EQ(dataset.size(), all.size());
  EXPECT_EQ(dataset.document_begin(700), all.size());

  std::uint64_t t = 0;
  for (std::uint64_t d = 0; d < documents.size(); ++d) {
    ASSERT_EQ(dataset.document_begin(d), t);
    for (std::size_t i = 0; i < documents[d].size(); ++i) ASSERT_EQ(dataset.document_of(t++), d);
  }
  RandomStream random(2, "ranges");
  for (int i = 0; i < 200; ++i) {
    const std::uint64_t begin = random.next_below(all.size() + 1);
    std::vector<std::uint32_t> part(random.next_below(all.size() - begin + 1));
    dataset.read(begin, part);
    ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + static_cast<std::ptrdiff_t>(begin)));
  }
}

TEST(TokenDataset, RefusesPlacesOutside) {
  const TemporaryFolder folder;
  testing::write_dataset(folder / "a.h5", tiny, {{1, 2, 3}, {4}});
  const TokenDataset dataset(folder / "a.h5");
  std::vector<std::uint32_t> two(2);
  EXPECT_THROW(dataset.read(3, two), InternalError);
  EXPECT_THROW(dataset.read(UINT64_MAX, two), InternalError);
  EXPECT_THROW(dataset.document_of(4), InternalError);
  EXPECT_THROW(dataset.document_begin(3), InternalError);
}

TEST(TokenDataset, ReadsFilesOfOtherWriters) {  // through h5py: another string type, another placement
  const TokenDataset dataset(DELTAPIPE_GOLDEN_DIR "/tokens.h5");
  EXPECT_TRUE(dataset.is_mapped());
  EXPECT_EQ(testing::read_documents(dataset), (Documents{{0, 2, 3, 1}, {0, 4, 1}, {0, 3, 3, 2, 1}}));
  EXPECT_EQ(dataset.info().tokenizer, "colours");
  EXPECT_EQ(dataset.tokenizer_hash().size(), 16u);
  EXPECT_EQ(dataset.vocabulary(), 5u);
  EXPECT_EQ(dataset.bos(), 0);
  EXPECT_EQ(dataset.eos(), 1);
}

/// A dataset written by hand, with one part changed at a time.
struct Handmade {
  std::optional<std::string> format = "deltapipe-tokens";
  std::uint64_t version = 1;
  std::optional<std::uint64_t> vocabulary = 50;
  std::int64_t bos = 0;
  std::int64_t eos = 1;
  std::vector<std::uint32_t> tokens{5, 6, 7, 8};
  std::vector<std::uint64_t> offsets{0, 1, 4};
  DType token_type = DType::u32;
  DType offset_type = DType::u64;
  bool with_tokens = true;
  bool with_offsets = true;
  bool two_dimensional = false;
  bool chunked = false;

  void write(const std::filesystem::path& path) const {
    hdf5::File file = hdf5::File::create(path, true);
    if (format) file.set_attribute("/", "format", *format);
    file.set_attribute("/", "version", version);
    file.set_attribute("/", "tokenizer", "tiny");
    file.set_attribute("/", "tokenizer_hash", "00");
    if (vocabulary) file.set_attribute("/", "vocabulary", *vocabulary);
    file.set_attribute("/", "bos", bos);
    file.set_attribute("/", "eos", eos);
    const auto n = static_cast<std::int64_t>(tokens.size());
    if (with_tokens) {
      if (chunked) {
        hdf5::Dataset d = file.create_growing("/tokens", DType::u32, 3);
        d.append(Tensor(const_cast<std::uint32_t*>(tokens.data()), DType::u32, {n}));
      } else {
        const hdf5::Dataset d = file.create_dataset("/tokens", token_type, two_dimensional ? Shape{n, 1} : Shape{n});
        if (token_type == DType::u32) {
          d.write(Tensor(const_cast<std::uint32_t*>(tokens.data()), DType::u32, d.shape()));
        }
      }
    }
    if (with_offsets) {
      const Shape shape{static_cast<std::int64_t>(offsets.size())};
      if (chunked) {
        hdf5::Dataset d = file.create_growing("/document_offsets", DType::u64, 2);
        d.append(Tensor(const_cast<std::uint64_t*>(offsets.data()), DType::u64, shape));
      } else {
        const hdf5::Dataset d = file.create_dataset("/document_offsets", offset_type, shape);
        if (offset_type == DType::u64) {
          d.write(Tensor(const_cast<std::uint64_t*>(offsets.data()), DType::u64, shape));
        }
      }
    }
    file.close();
  }
};

TEST(TokenDataset, ReadsChunkedFiles) {
  const TemporaryFolder folder;
  Handmade h;
  h.chunked = true;
  h.write(folder / "a.h5");
  const TokenDataset dataset(folder / "a.h5");
  EXPECT_FALSE(dataset.is_mapped());
  EXPECT_EQ(testing::read_documents(dataset), (Documents{{5}, {6, 7, 8}}));
}

TEST(TokenDataset, NamesWhatIsWrong) {
  const TemporaryFolder folder;
  const auto path = folder / "broken.h5";
  const auto expect = [&](const char* complaint, const std::function<void(Handmade&)>& change) {
    Handmade h;
    change(h);
    h.write(path);
    const std::string message = error_of<FormatError>([&] { const TokenDataset dataset(path); });
    EXPECT_MENTIONS(message, path.string());
    EXPECT_MENTIONS(message, complaint);
  };
  Handmade().write(path);
  EXPECT_EQ(TokenDataset(path).size(), 4u);  // unchanged, it is whole

  expect("\"format\" is missing", [](Handmade& h) { h.format.reset(); });
  expect("\"format\" is \"other\", expected \"deltapipe-tokens\"", [](Handmade& h) { h.format = "other"; });
  expect("version 2, expected version 1", [](Handmade& h) { h.version = 2; });
  expect("\"vocabulary\"", [](Handmade& h) { h.vocabulary.reset(); });
  expect("\"vocabulary\" is 0", [](Handmade& h) { h.vocabulary = 0; });
  expect("\"vocabulary\" is 2147483649", [](Handmade& h) { h.vocabulary = (std::uint64_t{1} << 31) + 1; });
  expect("\"bos\" is -2", [](Handmade& h) { h.bos = -2; });
  expect("\"eos\" is 50", [](Handmade& h) { h.eos = 50; });
  expect("/tokens: there is no such dataset", [](Handmade& h) { h.with_tokens = false; });
  expect("/document_offsets: there is no such dataset", [](Handmade& h) { h.with_offsets = false; });
  expect("/tokens: holds int32, expected uint32", [](Handmade& h) { h.token_type = DType::i32; });
  expect("/tokens: holds float32, expected uint32", [](Handmade& h) { h.token_type = DType::f32; });
  expect("/document_offsets: holds int64, expected uint64", [](Handmade& h) { h.offset_type = DType::i64; });
  expect("/tokens: shape is [4, 1]", [](Handmade& h) { h.two_dimensional = true; });
  expect("/tokens: shape is [0]", [](Handmade& h) { h.tokens.clear(); });
  expect("/document_offsets: shape is [1]", [](Handmade& h) { h.offsets = {0}; });
  expect("/document_offsets: begins with 1", [](Handmade& h) { h.offsets = {1, 2, 4}; });
  expect("/document_offsets: entry 2 is 1 after 1", [](Handmade& h) { h.offsets = {0, 1, 1, 4}; });
  expect("/document_offsets: entry 2 is 2 after 3", [](Handmade& h) { h.offsets = {0, 3, 2, 4}; });
  expect("/document_offsets: ends with 3, expected the number of tokens, 4", [](Handmade& h) { h.offsets = {0, 3}; });
  expect("/document_offsets: ends with 5", [](Handmade& h) { h.offsets = {0, 5}; });
  expect("/document_offsets: ends with 3", [](Handmade& h) {
    h.chunked = true;
    h.offsets = {0, 3};
  });
}

TEST(TokenDataset, NamesTheTokenBeyondTheVocabulary) {
  const TemporaryFolder folder;
  for (const bool chunked : {false, true}) {
    Handmade h;
    h.tokens = {49, 49, 49, 50, 99};
    h.offsets = {0, 5};
    h.chunked = chunked;
    h.write(folder / "a.h5");
    const TokenDataset dataset(folder / "a.h5");
    std::vector<std::uint32_t> three(3);
    dataset.read(0, three);
    const std::string message = error_of<FormatError>([&] { dataset.read(2, three); });
    EXPECT_MENTIONS(message, "a.h5: /tokens[3] is 50, expected an id below the vocabulary of 50");
  }
}

TEST(TokenDataset, RefusesForeignAndTruncatedFiles) {
  const TemporaryFolder folder;
  EXPECT_THROW(TokenDataset(folder / "missing.h5"), IoError);
  for (const auto& [name, content] : {std::pair{"empty.h5", ""}, std::pair{"text.h5", "just text\n"}}) {
    const auto path = testing::write_text(folder / name, content);
    EXPECT_MENTIONS(error_of<FormatError>([&] { const TokenDataset dataset(path); }), name);
  }
  testing::write_dataset(folder / "whole.h5", tiny, testing::random_documents(3, 400, 100, 50));
  const std::string whole = read_file(folder / "whole.h5");
  for (std::size_t keep = 0; keep < whole.size(); keep += 1 + whole.size() / 100) {
    const auto path = testing::write_text(folder / "cut.h5", std::string_view(whole).substr(0, keep));
    EXPECT_MENTIONS(error_of<FormatError>([&] { const TokenDataset dataset(path); }), "cut.h5");
  }
}

TEST(TokenDataset, SurvivesDamagedContent) {  // tokens and offsets of any value: read, or refused with a FormatError
  const TemporaryFolder folder;
  const auto path = folder / "a.h5";
  testing::write_dataset(path, tiny, testing::random_documents(4, 20, 100, 50));
  const std::string whole = read_file(path);
  std::uint64_t token_begin = 0, offset_begin = 0, tokens = 0;
  {
    const hdf5::File file = hdf5::File::open(path);
    token_begin = file.dataset("/tokens").file_offset().value();
    offset_begin = file.dataset("/document_offsets").file_offset().value();
    tokens = static_cast<std::uint64_t>(file.dataset("/tokens").numel());
  }
  RandomStream random(5, "damage");
  int token_errors = 0, offset_errors = 0;
  for (int i = 0; i < 300; ++i) {
    std::string bytes = whole;
    const bool in_tokens = i % 2 == 0;
    const std::uint64_t at = in_tokens ? token_begin + random.next_below(tokens * sizeof(std::uint32_t))
                                       : offset_begin + random.next_below(21 * sizeof(std::uint64_t));
    bytes[at] = static_cast<char>(bytes[at] ^ static_cast<char>(1 << random.next_below(8)));
    testing::write_text(path, bytes);
    try {
      testing::read_documents(TokenDataset(path));
    } catch (const FormatError& e) {
      EXPECT_MENTIONS(e.what(), in_tokens ? "/tokens[" : "/document_offsets");
      ++(in_tokens ? token_errors : offset_errors);
    }
  }
  // A flipped bit takes a token beyond 50 of 2^32 ids, or an offset past its neighbours, more often than not.
  EXPECT_GT(token_errors, 75);
  EXPECT_GT(offset_errors, 75);
}

TEST(TokenDatasetWriter, JoinsPartsOfADocument) {
  const TemporaryFolder folder;
  TokenDatasetWriter writer(folder / "a.h5", tiny);
  writer.append_part(std::vector<std::uint32_t>{1, 2});
  writer.append_part({});
  writer.append_part(std::vector<std::uint32_t>{3});
  writer.end_document();
  writer.append(std::vector<std::uint32_t>{4});
  EXPECT_EQ(writer.documents(), 2u);
  EXPECT_EQ(writer.tokens(), 4u);
  EXPECT_TRUE(folder.names().empty());  // nothing to see before the end
  writer.finish();
  EXPECT_EQ(testing::read_documents(TokenDataset(folder / "a.h5")), (Documents{{1, 2, 3}, {4}}));
}

TEST(TokenDatasetWriter, HoldsMoreThanItsBuffers) {
  const TemporaryFolder folder;
  const Documents documents = testing::random_documents(6, 9, 200'000, 50);  // about 900,000 tokens
  testing::write_dataset(folder / "a.h5", tiny, documents);
  EXPECT_EQ(testing::read_documents(TokenDataset(folder / "a.h5")), documents);
}

TEST(TokenDatasetWriter, RefusesWhatNoDatasetHolds) {
  const TemporaryFolder folder;
  {
    TokenDatasetWriter writer(folder / "a.h5", tiny);
    EXPECT_THROW(writer.append({}), InternalError);
    EXPECT_THROW(writer.append(std::vector<std::uint32_t>{50}), InternalError);
    EXPECT_MENTIONS(error_of<FormatError>([&] { writer.finish(); }), "a.h5: no document");
    writer.append_part(std::vector<std::uint32_t>{1});
    EXPECT_THROW(writer.finish(), InternalError);
  }
  EXPECT_THROW(TokenDatasetWriter(folder / "b.h5", {"x", "y", 0, -1, -1}), InternalError);
  EXPECT_THROW(TokenDatasetWriter(folder / "b.h5", {"x", "y", 5, 5, -1}), InternalError);
  EXPECT_TRUE(folder.names().empty());
}

TEST(TokenDatasetWriter, AbandonedLeavesTheOldFile) {
  const TemporaryFolder folder;
  testing::write_text(folder / "a.h5", "older");
  {
    TokenDatasetWriter writer(folder / "a.h5", tiny);
    writer.append(std::vector<std::uint32_t>{1});
    writer.complete();
    EXPECT_EQ(folder.names().size(), 2u);
  }
  EXPECT_EQ(folder.names(), std::set<std::string>{"a.h5"});
  EXPECT_EQ(read_file(folder / "a.h5"), "older");
}

TEST(TokenDatasetWriter, FullDiskLeavesNothing) {
  const TemporaryFolder folder;
  const std::vector<std::uint32_t> document(1 << 20, 7);  // 4 MiB
  std::string message;
  {
    TokenDatasetWriter writer(folder / "a.h5", tiny);
    const testing::FileSizeLimit limit(1 << 20);
    message = error_of<IoError>([&] { writer.append(document); });
  }
  EXPECT_MENTIONS(message, "File too large");
  EXPECT_TRUE(folder.names().empty());

  // Room for nothing; for the waiting tokens alone, while the file holds a little more; for the file but its last byte.
  const std::uint64_t bytes = (document.size() + 300'000) * sizeof(std::uint32_t);
  testing::write_dataset(folder / "a.h5", tiny, {document, std::vector<std::uint32_t>(300'000, 8)});
  const std::uint64_t whole = std::filesystem::file_size(folder / "a.h5");
  std::filesystem::remove(folder / "a.h5");
  for (const auto& [room, place] :
       {std::pair{std::uint64_t{0}, "folder"}, std::pair{bytes, ".h5.tmp"}, std::pair{whole - 1, ".h5.tmp"}}) {
    {
      TokenDatasetWriter writer(folder / "a.h5", tiny);
      writer.append(document);
      writer.append(std::vector<std::uint32_t>(300'000, 8));
      const testing::FileSizeLimit limit(room);
      const std::string reason = error_of<IoError>([&] { writer.finish(); });
      EXPECT_MENTIONS(reason, place);
      EXPECT_MENTIONS(reason, "File too large");
    }
    EXPECT_TRUE(folder.names().empty()) << room;
  }
}

TEST(TokenDatasetWriter, UnwritableFolderIsAnIoError) {
  const TemporaryFolder folder;
  testing::write_text(folder / "file", "");
  EXPECT_MENTIONS(error_of<IoError>([&] { TokenDatasetWriter(folder / "no/a.h5", tiny); }), "No such file");
  EXPECT_MENTIONS(error_of<IoError>([&] { TokenDatasetWriter(folder / "file/a.h5", tiny); }), "Not a directory");
  std::filesystem::create_directory(folder / "taken.h5");
  EXPECT_MENTIONS(error_of<IoError>([&] { TokenDatasetWriter(folder / "taken.h5", tiny); }), "is a folder");

  std::filesystem::create_directory(folder / "closed");
  std::filesystem::permissions(folder / "closed", std::filesystem::perms::owner_read);
  std::filesystem::permissions(folder.path(), std::filesystem::perms::all);
  const bool root = geteuid() == 0;  // whom no permission stops
  constexpr uid_t nobody = 65534;
  ASSERT_EQ(seteuid(root ? nobody : geteuid()), 0);
  const std::string message = error_of<IoError>([&] { TokenDatasetWriter(folder / "closed/a.h5", tiny); });
  ASSERT_EQ(seteuid(root ? 0 : geteuid()), 0);
  EXPECT_MENTIONS(message, "Permission denied");
  std::filesystem::permissions(folder / "closed", std::filesystem::perms::owner_all);
}

}  // namespace
}  // namespace deltapipe
