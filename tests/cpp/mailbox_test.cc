// Mailbox: exchange, closing, waiting, and that no reference is lost or kept.
#include "runtime/mailbox.h"

#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "scripted_program.h"

namespace flowprefill {
namespace {

using testing::scripted_run;
using Delivery = Mailbox::Delivery;

class MailboxTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(num_alive_, 0); }
  RunRef make(uint64_t id) { return scripted_run(num_alive_, id, 1); }
  // Puts the run and returns what it displaced.
  RunRef put(Mailbox& mailbox, RunRef run) {
    EXPECT_EQ(mailbox.put(run), Delivery::kPut);
    return run;
  }

  std::atomic<int> num_alive_{0};
};

TEST_F(MailboxTest, put_into_empty_displaces_nothing_and_take_gives_it_back) {
  Mailbox mailbox;
  const RunRef run = make(1);
  EXPECT_FALSE(mailbox.has_mail());
  EXPECT_EQ(put(mailbox, run), nullptr);
  EXPECT_TRUE(mailbox.has_mail());
  EXPECT_EQ(mailbox.take(), run);
  EXPECT_FALSE(mailbox.has_mail());
  EXPECT_EQ(mailbox.take(), nullptr);
}

TEST_F(MailboxTest, put_displaces_the_run_before) {
  Mailbox mailbox;
  const RunRef first = make(1);
  const RunRef second = make(2);
  put(mailbox, first);
  EXPECT_EQ(put(mailbox, second), first);
  EXPECT_EQ(put(mailbox, second), second);
  EXPECT_EQ(put(mailbox, nullptr), second);
  EXPECT_FALSE(mailbox.has_mail());
}

TEST_F(MailboxTest, run_in_the_mailbox_is_kept_alive) {
  Mailbox mailbox;
  put(mailbox, make(1));
  EXPECT_EQ(num_alive_, 1);
  EXPECT_EQ(mailbox.take()->id(), 1u);
  EXPECT_EQ(num_alive_, 0);
}

TEST_F(MailboxTest, destruction_frees_the_run_inside) {
  {
    Mailbox mailbox;
    put(mailbox, make(1));
  }
  EXPECT_EQ(num_alive_, 0);
}

TEST_F(MailboxTest, remove_takes_out_only_that_run) {
  Mailbox mailbox;
  RunRef run = make(1);
  const RunRef other = make(2);
  put(mailbox, run);
  EXPECT_FALSE(mailbox.remove(*other));
  EXPECT_TRUE(mailbox.remove(*run));
  EXPECT_FALSE(mailbox.remove(*run));
  EXPECT_FALSE(mailbox.has_mail());
  run.reset();
  EXPECT_EQ(num_alive_, 1);
}

TEST_F(MailboxTest, close_returns_the_run_and_refuses_every_later_one) {
  Mailbox mailbox;
  const RunRef first = make(1);
  put(mailbox, first);
  EXPECT_EQ(mailbox.close(), first);
  EXPECT_TRUE(mailbox.is_closed());
  EXPECT_TRUE(mailbox.has_mail());
  EXPECT_EQ(mailbox.take(), nullptr);
  EXPECT_EQ(mailbox.close(), nullptr);
  RunRef late = make(2);
  EXPECT_EQ(mailbox.put(late), Delivery::kClosed);
  EXPECT_EQ(late->id(), 2u) << "the refused run has to stay with its caller";
  EXPECT_FALSE(mailbox.remove(*late));
  EXPECT_TRUE(mailbox.is_closed());
}

TEST_F(MailboxTest, wait_ends_with_a_put_and_with_close) {
  for (const bool is_close : {false, true}) {
    Mailbox mailbox;
    std::jthread reader([&] { mailbox.wait(); });
    if (is_close) {
      mailbox.close();
    } else {
      put(mailbox, make(1));
    }
  }
}

TEST_F(MailboxTest, wait_ping_pong_loses_no_wake_up) {
  Mailbox there;
  Mailbox back;
  std::jthread echo([&] {
    for (int i = 0; i < 2000; ++i) {
      there.wait();
      put(back, there.take());
    }
  });
  for (uint64_t i = 0; i < 2000; ++i) {
    put(there, make(i));
    back.wait();
    ASSERT_EQ(back.take()->id(), i);
  }
}

// Every reference put in comes out exactly once: displaced, taken or left at the end.
TEST_F(MailboxTest, concurrent_puts_and_takes_conserve_every_run) {
  constexpr uint64_t kPerThread = 3000;
  Mailbox mailbox;
  std::mutex mutex;
  std::map<uint64_t, int> seen;
  const auto note = [&](const RunRef& run) {
    if (run) {
      const std::lock_guard lock(mutex);
      ++seen[run->id()];
    }
  };
  {
    std::vector<std::jthread> threads;
    for (uint64_t t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        for (uint64_t i = 0; i < kPerThread; ++i) {
          note(put(mailbox, make(t * kPerThread + i)));
          if (i % 3 == t) {
            note(mailbox.take());
          }
        }
      });
    }
  }
  note(mailbox.take());
  EXPECT_EQ(seen.size(), 3 * kPerThread);
  for (const auto& [id, times] : seen) {
    ASSERT_EQ(times, 1) << "run " << id;
  }
}

}  // namespace
}  // namespace flowprefill
