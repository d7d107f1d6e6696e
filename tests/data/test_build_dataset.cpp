#include "data/build_dataset.h"

#include "core/error.h"
#include "core/file.h"
#include "data/byte_vocabulary.h"
#include "data/describe_dataset.h"
#include "tests/data/testing.h"

#include <cmath>
#include <map>

namespace deltapipe {
namespace {

using testing::error_of;
using testing::TemporaryFolder;
using testing::write_text;

/// Texts of a dataset's documents; each must end with eos and hold no other special token.
std::vector<std::string> texts_of(const std::filesystem::path& path) {
  const TokenDataset dataset(path);
  EXPECT_EQ(dataset.tokenizer_hash(), byte_vocabulary::tokenizer_hash());
  EXPECT_EQ(dataset.vocabulary(), 258u);
  EXPECT_EQ(dataset.bos(), 256);
  EXPECT_EQ(dataset.eos(), 257);
  std::vector<std::string> texts;
  for (auto ids : testing::read_documents(dataset)) {
    EXPECT_EQ(ids.back(), byte_vocabulary::eos);
    ids.pop_back();
    texts.push_back(byte_vocabulary::decode(ids));
    EXPECT_EQ(texts.back().size(), ids.size());
  }
  return texts;
}

TEST(BuildDataset, TakesFilesAndFoldersInOrder) {
  const TemporaryFolder folder;
  std::string every_byte;
  for (int c = 0; c < 256; ++c) every_byte.push_back(static_cast<char>(c));
  write_text(folder / "in/b.txt", "bee");
  write_text(folder / "in/a/z.txt", every_byte);
  write_text(folder / "in/a/empty.txt", "");
  write_text(folder / "in/c.jsonl", "{\"text\": \"one\"}\n\n{\"id\": 7, \"text\": \"tw\\u00f6\\n\"}\n{\"text\": \"\"}");
  write_text(folder / "in/.git/config", "hidden");
  write_text(folder / "in/.hidden", "hidden");
  const auto extra = write_text(folder / "extra.md", "explicit");
  BuildOptions options;
  options.inputs = {extra, folder / "in"};
  options.out = folder / "in/out.h5";
  for (int run = 0; run < 2; ++run) {  // the second one meets the first one's output in the folder
    const BuildReport report = build_dataset(options);
    EXPECT_EQ(texts_of(options.out), (std::vector<std::string>{"explicit", every_byte, "bee", "one", "tw\xc3\xb6\n"}));
    EXPECT_EQ(report.files, 5u);
    EXPECT_EQ(report.empty_documents, 2u);
    EXPECT_EQ(report.train.documents, 5u);
    EXPECT_EQ(report.train.bytes, 8u + 256 + 3 + 3 + 5);
    EXPECT_EQ(report.train.tokens, report.train.bytes + 5);
    EXPECT_EQ(TokenDataset(options.out).size(), report.train.tokens);
    EXPECT_EQ(report.validation.documents, 0u);
  }
}

TEST(BuildDataset, FiltersFoldersBySuffix) {
  const TemporaryFolder folder;
  write_text(folder / "in/a.txt", "a");
  write_text(folder / "in/b.rst", "b");
  write_text(folder / "in/c.bin", "c");
  write_text(folder / "in/d.txt.gz", "d");
  BuildOptions options;
  options.inputs = {folder / "in"};
  options.out = folder / "out.h5";
  EXPECT_MENTIONS(error_of<UsageError>([&] { build_dataset(options); }), "d.txt.gz");
  options.suffixes = {".txt", ".rst"};
  build_dataset(options);
  EXPECT_EQ(texts_of(options.out), (std::vector<std::string>{"a", "b"}));
  options.suffixes = {".md"};
  EXPECT_MENTIONS(error_of<UsageError>([&] { build_dataset(options); }), "no input files");
}

TEST(BuildDataset, StreamsLongTextFiles) {
  const TemporaryFolder folder;
  // Around the size of a reading block, where the last part is empty or short.
  for (const std::size_t size : {(1u << 20) - 1, 1u << 20, (1u << 20) + 1, 3u << 20}) {
    std::string text(size, 'x');
    for (std::size_t i = 0; i < size; i += 997) text[i] = static_cast<char>(i % 251);
    BuildOptions options;
    options.inputs = {write_text(folder / "a.txt", text)};
    options.out = folder / "out.h5";
    build_dataset(options);
    ASSERT_EQ(texts_of(options.out), std::vector<std::string>{text}) << size;
  }
}

TEST(BuildDataset, SetsWholeDocumentsAside) {
  const TemporaryFolder folder;
  std::string lines;
  std::vector<std::string> all;
  for (int i = 0; i < 200; ++i) {
    all.push_back("document " + std::to_string(i));
    lines += "{\"body\": \"" + all.back() + "\"}\n" + (i % 10 == 0 ? "{\"body\": \"\"}\n" : "");
  }
  BuildOptions options;
  options.inputs = {write_text(folder / "a.jsonl", lines)};
  options.field = "body";
  options.out = folder / "train.h5";
  options.validation = folder / "validation.h5";
  std::map<std::uint64_t, std::vector<std::string>> chosen;
  for (const std::uint64_t seed : {1u, 2u, 1u}) {
    options.seed = seed;
    const BuildReport report = build_dataset(options);
    EXPECT_EQ(report.validation.documents, 10u);  // 0.05 of 200
    EXPECT_EQ(report.train.documents, 190u);
    EXPECT_EQ(report.empty_documents, 20u);
    const auto train = texts_of(options.out);
    const auto validation = texts_of(options.validation);
    EXPECT_EQ(validation.size(), 10u);
    std::vector<std::string> merged;  // both keep the order of the input
    auto t = train.begin();
    auto v = validation.begin();
    for (const auto& text : all) {
      if (v != validation.end() && *v == text) {
        merged.push_back(*v++);
      } else if (t != train.end()) {
        merged.push_back(*t++);
      }
    }
    EXPECT_EQ(merged, all);
    EXPECT_EQ(chosen.try_emplace(seed, validation).first->second, validation) << "the same seed chose others";
  }
  EXPECT_NE(chosen[1], chosen[2]);

  for (const auto& [fraction, expected] : {std::pair{0.0001, 1u}, std::pair{0.5, 100u}, std::pair{0.9999, 199u}}) {
    options.validation_fraction = fraction;
    EXPECT_EQ(build_dataset(options).validation.documents, expected);
  }
}

TEST(BuildDataset, NamesBadLines) {
  const TemporaryFolder folder;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"text\": \"half", "not JSON"},
      {"{\"text\": \"a\"} {\"text\": \"b\"}", "not JSON"},
      {"[\"text\"]", "expected a JSON object with the key \"text\""},
      {"{\"body\": \"x\"}", "expected a JSON object with the key \"text\""},
      {"{\"text\": null}", "\"text\" is null, expected a string"},
      {"{\"text\": 7}", "\"text\" is number, expected a string"},
      {"{\"text\": \"\xff\"}", "not JSON"},  // JSON is UTF-8; only text files take any byte
      {"{\"text\": \"\\ud800\"}", "not JSON"},
      {std::string(200'000, '['), "not JSON"},
  };
  for (const auto& [line, complaint] : cases) {
    BuildOptions options;
    options.inputs = {write_text(folder / "a.jsonl", "{\"text\": \"fine\"}\n\r\n" + line + "\n")};
    options.out = folder / "out.h5";
    for (const bool split : {false, true}) {
      if (split) options.validation = folder / "validation.h5";
      const std::string message = error_of<FormatError>([&] { build_dataset(options); });
      EXPECT_MENTIONS(message, (folder / "a.jsonl").string() + ":3: " + complaint);
      EXPECT_EQ(folder.names(), std::set<std::string>{"a.jsonl"});
    }
  }
  const std::string deep = "{\"text\": \"x\", \"y\": " + std::string(200'000, '[') + std::string(200'000, ']') + "}";
  BuildOptions options;
  options.inputs = {write_text(folder / "a.jsonl", deep)};
  options.out = folder / "out.h5";
  EXPECT_EQ(build_dataset(options).train.documents, 1u);
}

TEST(BuildDataset, RefusesWrongOptions) {
  const TemporaryFolder folder;
  const auto input = write_text(folder / "a.txt", "text");
  const auto expect = [&](const char* complaint, BuildOptions options) {
    EXPECT_MENTIONS(error_of<UsageError>([&] { build_dataset(options); }), complaint);
    EXPECT_EQ(folder.names(), std::set<std::string>{"a.txt"});
  };
  BuildOptions good;
  good.inputs = {input};
  good.out = folder / "out.h5";
  BuildOptions o = good;
  o.inputs.clear();
  expect("no inputs", o);
  o = good;
  o.out.clear();
  expect("no output", o);
  o = good;
  o.out = input;
  expect("both an input and an output", o);
  o = good;
  o.validation = folder / "./out.h5";
  expect("both --out and --validation", o);
  for (const double fraction : {0.0, 1.0, -0.1, std::nan("")}) {
    o = good;
    o.validation = folder / "v.h5";
    o.validation_fraction = fraction;
    expect("--validation-fraction", o);
  }
  o = good;
  o.validation = folder / "v.h5";
  expect("at least two", o);
  o = good;
  o.inputs = {"/dev/null"};
  expect("no document with any text", o);
  o = good;
  o.inputs = {folder / "missing.txt"};
  EXPECT_MENTIONS(error_of<IoError>([&] { build_dataset(o); }), "missing.txt: No such file");
}

TEST(BuildDataset, AFullDiskLeavesNeitherFile) {
  const TemporaryFolder folder;
  BuildOptions options;
  options.inputs = {write_text(folder / "a.txt", std::string(3 << 20, 'a')), write_text(folder / "b.txt", "b")};
  options.out = folder / "out.h5";
  options.validation = folder / "validation.h5";
  // Room for nothing; for the waiting tokens of the long document but not for the file that holds them.
  std::set<std::uint64_t> long_sides;  // validation documents' bytes: the long document goes to either side
  for (const std::uint64_t room : {std::uint64_t{1} << 20, ((std::uint64_t{3} << 20) + 1) * sizeof(std::uint32_t)}) {
    for (options.seed = 1; options.seed <= 4; ++options.seed) {
      {
        const testing::FileSizeLimit limit(room);
        EXPECT_MENTIONS(error_of<IoError>([&] { build_dataset(options); }), "File too large");
        EXPECT_EQ(folder.names(), (std::set<std::string>{"a.txt", "b.txt"}));
      }
      long_sides.insert(build_dataset(options).validation.bytes);
      std::filesystem::remove(options.out);
      std::filesystem::remove(options.validation);
    }
  }
  EXPECT_EQ(long_sides.size(), 2u);
}

TEST(DescribeDataset, ShowsTheFirstBytesAsText) {
  const TemporaryFolder folder;
  BuildOptions options;
  options.inputs = {write_text(folder / "a.txt", "Hi\n\xff"), write_text(folder / "b.txt", std::string(300, 'b'))};
  options.out = folder / "out.h5";
  build_dataset(options);
  const std::string table = describe_dataset(options.out);
  for (const char* line :
       {"documents         2\n", "tokens            306\n", "longest document  301\n", "mean document     153.0\n",
        "vocabulary        258\n", "bos               256\n", "eos               257\n", "memory map\n"}) {
    EXPECT_MENTIONS(table, line);
  }
  EXPECT_MENTIONS(table, "Hi\\n\\xff<eos>" + std::string(59, 'b') + "\n");  // 64 tokens
  EXPECT_MENTIONS(table, byte_vocabulary::tokenizer_hash());

  testing::write_dataset(folder / "ids.h5", {"tiny", "00", 50, -1, 3}, {{7, 8, 9}});
  EXPECT_MENTIONS(describe_dataset(folder / "ids.h5"), "first tokens      7 8 9\n");
  EXPECT_MENTIONS(describe_dataset(folder / "ids.h5"), "bos               none\n");
  EXPECT_THROW(describe_dataset(folder / "a.txt"), FormatError);
}

}  // namespace
}  // namespace deltapipe
