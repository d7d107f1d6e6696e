// Token datasets that are foreign, damaged or do not fit the model.
#include "core/file.h"
#include "core/hdf5.h"
#include "core/random.h"
#include "tests/cli/workshop.h"

#include <cstring>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::expect_refusal;
using testing::Outcome;
using testing::Workshop;
using testing::write_text;

std::vector<std::string> train_on(const std::string& data) {
  return {"train", "job.toml", "--set", "data.train='" + data + "'"};
}

TEST(BadData, ForeignFilesAreRefused) {
  const Workshop shop;
  shop.write_job(2, 2);
  write_text(shop / "empty.h5", "");
  write_text(shop / "text.h5", "Once upon a time there was no dataset.");
  hdf5::File::create(shop / "bare.h5").close();
  {
    hdf5::File other = hdf5::File::create(shop / "other.h5");
    other.set_attribute("/", "format", "someone else's");
    other.close();
  }
  const std::string good = read_file(shop / "train.h5");
  write_text(shop / "cut.h5", std::string_view(good).substr(0, good.size() / 2));
  ASSERT_TRUE(testing::succeeds(shop.run({"train", "teacher.toml"})));
  const std::string rank_file = "runs/teacher/checkpoints/step-00000010/rank-00000.h5";
  for (const std::string file : {"empty.h5", "text.h5", "bare.h5", "other.h5", "cut.h5", rank_file.c_str()}) {
    SCOPED_TRACE(file);
    expect_refusal(shop, 4, {file}, train_on(file));
    expect_refusal(shop, 4, {file}, {"eval", "teacher", "--data", file});
    expect_refusal(shop, 4, {file}, {"inspect", file});
    expect_refusal(shop, 4, {file}, {"train", "job.toml", "--set", "data.validation='" + file + "'"});
  }
  for (const std::string file : {"missing.h5", "text"}) expect_refusal(shop, 5, {file}, train_on(file));
  // Bad text is told with its place.
  write_text(shop / "bad.jsonl", "{\"text\": \"fine\"}\n{\"text\": 3}\n");
  expect_refusal(shop, 4, {"bad.jsonl:2"}, {"data", "bad.jsonl", "--out", "out.h5"});
  write_text(shop / "nothing/empty.txt", "");
  expect_refusal(shop, 2, {"no document"}, {"data", "nothing", "--out", "out.h5"});
  expect_refusal(shop, 5, {"gone.txt"}, {"data", "gone.txt", "--out", "out.h5"});
}

TEST(BadData, VocabulariesMustFit) {
  const Workshop shop;
  shop.write_job(2, 2);
  testing::write_dataset(shop / "large.h5", {"large", "none", 300, -1, -1}, testing::random_documents(1, 50, 60, 300));
  expect_refusal(shop, 3, {"large.h5", "300", "258"}, train_on("large.h5"));
  expect_refusal(shop, 3, {"large.h5", "300", "258"}, {"train", "job.toml", "--set", "data.validation='large.h5'"});
  expect_refusal(shop, 3, {"large.h5", "300", "258"}, {"eval", "teacher", "--data", "large.h5"});
}

TEST(BadData, TokensBeyondTheVocabularyStopARun) {
  const Workshop shop;
  shop.write_job(20, 2);
  std::string bytes = read_file(shop / "train.h5");
  const auto offset = hdf5::File::open(shop / "train.h5").dataset("/tokens").file_offset();
  ASSERT_TRUE(offset);
  const auto tokens = hdf5::File::open(shop / "train.h5").dataset("/tokens").numel();
  // One in thirty: whichever windows the first steps show, one of them holds a damaged token.
  for (std::int64_t t = 7; t < tokens; t += 30) {
    const std::uint32_t id = 4'000'000'000u;
    std::memcpy(bytes.data() + *offset + static_cast<std::size_t>(t) * sizeof id, &id, sizeof id);
  }
  write_text(shop / "damaged.h5", bytes);
  const Outcome o = shop.run(train_on("damaged.h5"));
  EXPECT_TRUE(testing::fails_with(4, {"damaged.h5", "/tokens[", "4000000000", "258"}, o));
  for (const auto& [name, content] : testing::list_files(shop / "runs")) {
    EXPECT_EQ(name.find("step-"), std::string::npos) << "a checkpoint of a run that could not begin\n" << o;
  }
  expect_refusal(shop, 4, {"damaged.h5", "/tokens["}, {"eval", "teacher", "--data", "damaged.h5"});
}

}  // namespace
}  // namespace deltapipe
