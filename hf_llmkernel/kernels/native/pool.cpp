#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <memory>
#include <mutex>
#include <thread>

namespace llmk {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPhaseSpin = std::chrono::microseconds(40);   // a phase is some tens of microseconds
constexpr auto kIdleSpin = std::chrono::microseconds(150);   // waking a sleeper costs about as much as this wait

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

template <class Ready>
bool spin(std::chrono::microseconds time, Ready&& ready) {
    const auto end = Clock::now() + time;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause_cpu();
        }
    } while (Clock::now() < end);
    return ready();
}

// The workers of a process. A call is open while the caller is in it; a worker joins an open call once, and the caller
// waits for those that have joined. Generation, openness and the number inside are one word, so that joining is atomic.
class Pool {
  public:
    void run(int threads, const std::function<void(Team&)>& body) {
        meeting_.reset(threads);
        while (workers_ < threads - 1) start_worker();
        body_ = &body;
        threads_.store(threads, std::memory_order_relaxed);
        open();
        Team team(0, threads, meeting_);
        body(team);
        close();
    }

    std::mutex busy;

  private:
    static constexpr uint32_t kCount = 0xff, kOpen = 0x100, kGeneration = 0x200;

    void start_worker() {
        std::thread([this, index = ++workers_] { work(index); }).detach();
    }

    void open() {
        state_.store(((state_.load(std::memory_order_relaxed) & ~(kCount | kOpen)) + kGeneration) | kOpen);
        if (asleep_.load() > 0) wake_all(state_);
    }

    void close() {
        state_.fetch_and(~kOpen);
        const auto empty = [this] { return (state_.load(std::memory_order_acquire) & kCount) == 0; };
        if (spin(kPhaseSpin, empty)) return;
        caller_asleep_.store(true);
        while (!empty()) {
            const uint32_t state = state_.load();
            if (state & kCount) sleep_while(state_, state);
        }
        caller_asleep_.store(false);
    }

    void work(int index) {
        uint32_t last = 0;  // generation of the last call seen
        for (;;) {
            const auto called = [&] {
                const uint32_t state = state_.load(std::memory_order_acquire);
                return (state & kOpen) && (state & ~(kCount | kOpen)) != last;
            };
            if (!spin(kIdleSpin, called)) sleep_until(called);
            uint32_t state = state_.load();
            if (!(state & kOpen)) continue;
            last = state & ~(kCount | kOpen);
            if (index >= threads_.load(std::memory_order_relaxed)) continue;
            if (!state_.compare_exchange_strong(state, state + 1)) {
                last = 0;
                continue;
            }
            Team team(index, threads_.load(std::memory_order_relaxed), meeting_);
            (*body_)(team);
            state_.fetch_sub(1, std::memory_order_release);
            if (caller_asleep_.load()) wake_all(state_);
        }
    }

    template <class Ready>
    void sleep_until(Ready&& ready) {
        asleep_.fetch_add(1);
        for (;;) {
            const uint32_t state = state_.load();
            if (ready()) break;
            sleep_while(state_, state);
        }
        asleep_.fetch_sub(1);
    }

    Meeting meeting_;
    int workers_ = 0;
    std::atomic<uint32_t> state_{0};
    std::atomic<uint32_t> asleep_{0};
    std::atomic<bool> caller_asleep_{false};
    const std::function<void(Team&)>* body_ = nullptr;
    std::atomic<int> threads_{0};
};

Pool* pool = nullptr;
std::once_flag pool_made;

// Threads do not survive a fork: the child begins with a pool of its own, and leaves its parent's memory alone.
void forget_pool() { pool = new Pool; }

Pool& the_pool() {
    std::call_once(pool_made, [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, forget_pool);
    });
    return *pool;
}

void run_alone(const std::function<void(Team&)>& body) {
    Meeting own;
    Team team(0, 1, own);
    body(team);
}

constexpr int kCountBits = 20;  // of the chunks that a share can have
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;

// Takes one of the `count` chunks of a share in a phase: how many lie before it from that end, or -1 where none is left. A
// share of a later phase means that this thread is late, and this phase done.
int64_t take_of(Share& share, uint64_t phase, int64_t count, bool from_front) {
    uint64_t taken = share.taken.load(std::memory_order_relaxed);
    for (;;) {
        const uint64_t of = taken >> (2 * kCountBits);
        if (of > phase) return -1;
        uint64_t front = of == phase ? (taken >> kCountBits) & kCountMask : 0;
        uint64_t back = of == phase ? taken & kCountMask : 0;
        if (static_cast<int64_t>(front + back) >= count) return -1;
        const auto at = static_cast<int64_t>(from_front ? front++ : back++);
        if (share.taken.compare_exchange_weak(taken, (((phase << kCountBits) | front) << kCountBits) | back,
                                              std::memory_order_relaxed))
            return at;
    }
}

}  // namespace

int64_t Team::take(int64_t chunks) {
    for (int i = 0; i < threads_; ++i) {
        const int of = (index_ + i) % threads_;
        const int64_t count = (chunks - of + threads_ - 1) / threads_;
        const int64_t at = take_of(meeting_.shares[of], phase_, count, i == 0);
        if (at >= 0) return of + threads_ * (i == 0 ? at : count - 1 - at);
    }
    return -1;
}

void Team::finish(uint32_t chunks) {
    if (meeting_.done.fetch_add(chunks) + chunks == total_ && meeting_.sleepers.load() > 0) wake_all(meeting_.done);
}

// For all chunks of the phases so far.
void Team::wait(Ahead& ahead) {
    const auto complete = [&] { return meeting_.done.load(std::memory_order_acquire) >= total_; };
    const auto ready = [&] {
        ahead.fetch(4);
        return complete();
    };
    if (spin(kPhaseSpin, ready)) return;
    meeting_.sleepers.fetch_add(1);
    while (!complete()) {
        const uint32_t done = meeting_.done.load();
        if (done < total_) sleep_while(meeting_.done, done);
    }
    meeting_.sleepers.fetch_sub(1);
}

void run_team(int threads, const std::function<void(Team&)>& body) {
    if (threads <= 1) return run_alone(body);
    Pool& shared = the_pool();
    std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
    if (!lock.owns_lock()) return run_alone(body);
    shared.run(threads > kMostThreads ? kMostThreads : threads, body);
}

}  // namespace llmk
