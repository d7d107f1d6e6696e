// Broken schedules and what is said about them.
#include "core/error.h"
#include "tests/pipeline/testing.h"

#include <algorithm>

namespace deltapipe::pipeline {
namespace {

std::string complaint(const Schedule& schedule) {
  try {
    verify(schedule);
  } catch (const InternalError& error) {
    return error.what();
  }
  return "";
}

void expect_complaint(const Schedule& schedule, const std::string& words) {
  const std::string found = complaint(schedule);
  EXPECT_NE(found.find(words), std::string::npos) << "said: " << found << "\nwanted: " << words;
}

std::vector<Task>::iterator find(std::vector<Task>& list, TaskKind kind, int microbatch) {
  return std::find(list.begin(), list.end(), Task{kind, microbatch, 0, 0});
}

TEST(Verify, Sizes) {
  Schedule s = one_f_one_b(3, 4);
  EXPECT_EQ(complaint(s), "");
  s.tasks.pop_back();
  expect_complaint(s, "2 task lists for 3 ranks");
  s = one_f_one_b(3, 4);
  s.ahead.pop_back();
  expect_complaint(s, "'ahead' has 2 entries for 3 virtual stages");
  s = one_f_one_b(3, 4);
  s.ahead[1] = 1;
  expect_complaint(s, "stage 1 starts a step with 1 teacher forwards done, possible are 0 to 0");
  s = with_teacher_inline(one_f_one_b(3, 4));
  s.teacher = Teacher::ahead;
  EXPECT_EQ(complaint(s), "");
  s.ahead = {2, 3, 0};  // stage 1 would need what stage 0 has not run
  expect_complaint(s, "stage 1 starts a step with 3 teacher forwards done, possible are 0 to 2");
  s = one_f_one_b(3, 4);
  s.student = StudentWork::align;
  expect_complaint(s, "mixer alignment without a teacher");
}

TEST(Verify, MissingTask) {
  Schedule s = with_teacher_inline(one_f_one_b(4, 8));
  s.tasks[2].erase(find(s.tasks[2], TaskKind::backward, 5));
  expect_complaint(s, "rank 2 lacks backward of microbatch 5");
}

TEST(Verify, RepeatedTask) {
  Schedule s = one_f_one_b(4, 8);
  s.tasks[1].push_back({TaskKind::forward, 3, 0, 0});
  expect_complaint(s, "rank 1 has forward of microbatch 3 twice, at places 4 and 16");
}

TEST(Verify, ForeignTask) {
  for (const Task& task :
       {Task{TaskKind::backward_weight, 0, 0, 0}, Task{TaskKind::teacher_forward, 0, 0, 0},
        Task{TaskKind::forward, 8, 0, 0}, Task{TaskKind::forward, 0, 1, 0}, Task{TaskKind::forward, 0, 0, 1}}) {
    Schedule s = one_f_one_b(4, 8);
    s.tasks[0].push_back(task);
    expect_complaint(s, "rank 0 has " + describe(task) + " at place 16, which is no part of its step");
  }
}

TEST(Verify, TaskBeforeWhatItNeeds) {
  Schedule s = with_teacher_inline(one_f_one_b(4, 8));
  auto& last = s.tasks[3];
  std::iter_swap(find(last, TaskKind::teacher_forward, 2), find(last, TaskKind::forward, 2));
  expect_complaint(s,
                   "rank 3 has forward of microbatch 2 at place 6, before teacher_forward of microbatch 2, which it");
  s = zero_bubble(4, 8);
  std::iter_swap(find(s.tasks[0], TaskKind::backward_input, 4), find(s.tasks[0], TaskKind::backward_weight, 4));
  expect_complaint(s, "before backward_input of microbatch 4, which it needs");
}

TEST(Verify, OtherOrderThanSent) {
  Schedule s = one_f_one_b(4, 8);
  std::iter_swap(find(s.tasks[1], TaskKind::forward, 0), find(s.tasks[1], TaskKind::forward, 1));
  expect_complaint(s,
                   "channel activation from rank 0 to rank 1: message 0 is of forward of microbatch 0 (step 0), the "
                   "receiver expects forward of microbatch 1 (step 0)");
  s = one_f_one_b(4, 8);
  std::iter_swap(find(s.tasks[3], TaskKind::backward, 5), find(s.tasks[3], TaskKind::backward, 6));
  expect_complaint(s, "channel gradient from rank 3 to rank 2: message 5 is of backward of microbatch 6");
  // Between chunks, where no order of microbatches is broken.
  s = interleaved(2, 2, 4);
  std::swap(s.tasks[0][1], s.tasks[0][2]);  // forwards of microbatch 1, chunk 0 and microbatch 0, chunk 1
  ASSERT_EQ(s.tasks[0][1], (Task{TaskKind::forward, 0, 1, 0}));
  expect_complaint(s, "channel activation from rank 0 to rank 1: message 1 is of forward of microbatch 0, chunk 1");
}

TEST(Verify, MicrobatchesOutOfOrder) {
  Schedule s = one_f_one_b(2, 6);
  for (auto& list : s.tasks) {
    for (Task& t : list) {
      if (t.microbatch == 1 || t.microbatch == 2) t.microbatch = 3 - t.microbatch;
    }
  }
  expect_complaint(s,
                   "rank 0 has forward of microbatch 1 after forward of microbatch 2; microbatches must come in order");
}

TEST(Verify, Deadlock) {
  Schedule s = one_f_one_b(2, 4);  // rank 0 waits for a gradient before it has sent what rank 1 waits for
  std::iter_swap(find(s.tasks[0], TaskKind::forward, 1), find(s.tasks[0], TaskKind::backward, 0));
  auto& last = s.tasks[1];
  std::iter_swap(find(last, TaskKind::backward, 0), find(last, TaskKind::forward, 1));
  expect_complaint(s,
                   "deadlock: rank 0 waits at place 1 in backward of microbatch 0 for backward of microbatch 0 of rank "
                   "1; rank 1 waits at place 1 in forward of microbatch 1 for forward of microbatch 1 of rank 0");
}

// Any one task of a random schedule moved to any other place is either legal or told, never a wrong simulation.
TEST(Verify, MovedTasksAreToldOrLegal) {
  RandomStream random(40, "verify");
  int told = 0, legal = 0;
  for (int i = 0; i < 400; ++i) {
    const auto student = static_cast<StudentWork>(i % 3);
    Schedule s = random_legal_schedule(random.next_bits(), 1 + static_cast<int>(random.next_below(4)),
                                       1 + static_cast<int>(random.next_below(2)),
                                       1 + static_cast<int>(random.next_below(5)), student, Teacher::ahead);
    auto& list = s.tasks[random.next_below(s.tasks.size())];
    const Task task = list[random.next_below(list.size())];
    std::erase(list, task);
    list.insert(list.begin() + static_cast<std::ptrdiff_t>(random.next_below(list.size() + 1)), task);
    const CostModel cost = testing::random_costs(random, s.stages());
    if (complaint(s).empty()) {
      ++legal;
      testing::expect_sound(s, cost, simulate(s, cost));
    } else {
      ++told;
      EXPECT_THROW(simulate(s, cost), InternalError);
    }
  }
  EXPECT_GT(told, 50);
  EXPECT_GT(legal, 50);
}

}  // namespace
}  // namespace deltapipe::pipeline
