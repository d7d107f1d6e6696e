#include "data/byte_vocabulary.h"

#include "core/error.h"

#include <gtest/gtest.h>

namespace deltapipe {
namespace {

TEST(ByteVocabulary, EveryByteSurvives) {
  std::string text;
  for (int c = 0; c < 256; ++c) text.push_back(static_cast<char>(c));
  std::vector<std::uint32_t> ids;
  byte_vocabulary::encode(text, ids);
  ASSERT_EQ(ids.size(), 256u);
  for (std::uint32_t i = 0; i < 256; ++i) EXPECT_EQ(ids[i], i);
  EXPECT_EQ(byte_vocabulary::decode(ids), text);
}

TEST(ByteVocabulary, AppendsAndDropsSpecialTokensInText) {
  std::vector<std::uint32_t> ids{byte_vocabulary::bos};
  byte_vocabulary::encode("\xc3\xa9\xff", ids);  // an e with acute accent, then a byte that is never UTF-8
  ids.push_back(byte_vocabulary::eos);
  EXPECT_EQ(ids, (std::vector<std::uint32_t>{256, 0xc3, 0xa9, 0xff, 257}));
  EXPECT_EQ(byte_vocabulary::decode(ids), "\xc3\xa9\xff");
}

TEST(ByteVocabulary, RefusesForeignIds) {
  EXPECT_THROW(byte_vocabulary::decode(std::vector<std::uint32_t>{65, 258}), FormatError);
}

TEST(ByteVocabulary, HashNeverChanges) {  // files at rest carry it
  EXPECT_EQ(byte_vocabulary::tokenizer_hash(), "3ee64788be856cb6");
}

}  // namespace
}  // namespace deltapipe
