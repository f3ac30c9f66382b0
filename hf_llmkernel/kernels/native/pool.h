// Threads that stay between calls, and the phases of a call that they share out among themselves.
//
// A phase begins when all chunks of the one before are done, not when all threads have come: one that the system has put
// aside while it holds no chunk delays nobody, and whoever is there does the work. Of T threads each has every T-th chunk
// as its share, which it takes from the front; who is done with its own takes from the back of the others'. So a thread
// knows what it will read, and fetches that while it waits for a phase to begin.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace llmk {

constexpr int kMostThreads = 64;

// What of one thread's share of a phase is taken: number of the phase, chunks from the front, chunks from the back.
struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};
};

// What the threads of a call have in common.
struct Meeting {
    alignas(64) std::atomic<uint32_t> done{0};  // chunks, of all phases so far
    alignas(64) std::atomic<uint32_t> sleepers{0};
    Share shares[kMostThreads];

    void reset(int threads) {
        done.store(0, std::memory_order_relaxed);
        for (int i = 0; i < threads; ++i) shares[i].taken.store(0, std::memory_order_relaxed);
    }
};

// Bytes that will probably be read, fetched some at a time.
class Ahead {
  public:
    static constexpr int64_t kMost = 16 * 1024;

    Ahead() = default;
    Ahead(const uint8_t* begin, int64_t bytes) : at_(begin), end_(begin + (bytes < kMost ? bytes : kMost)) {}

    void fetch(int lines) {
        for (; lines > 0 && at_ < end_; --lines, at_ += 64) __builtin_prefetch(at_, 0, 2);
    }

  private:
    const uint8_t* at_ = nullptr;
    const uint8_t* end_ = nullptr;
};

// One thread's way through the phases of a call. Every thread runs the same code, so phases need no names.
class Team {
  public:
    Team(int index, int threads, Meeting& meeting) : index_(index), threads_(threads), meeting_(meeting) {}

    int threads() const { return threads_; }

    // The first one of this thread's share.
    int64_t first_chunk() const { return index_; }

    // Runs chunk(0) ... chunk(chunks - 1), each once, on whichever thread comes first, after that thread's prepare(). What
    // they write is there for later phases, and for who waits for the whole call.
    template <class Prepare, class Chunk>
    void run(int64_t chunks, Ahead ahead, Prepare&& prepare, Chunk&& chunk) {
        wait(ahead);
        ++phase_;
        int64_t index = take(chunks);
        if (index >= 0) prepare();
        uint32_t done = 0;
        for (; index >= 0; index = take(chunks), ++done) chunk(index);
        total_ += static_cast<uint32_t>(chunks);
        if (done > 0) finish(done);
    }

    template <class Chunk>
    void run(int64_t chunks, Chunk&& chunk) {
        run(chunks, {}, [] {}, chunk);
    }

  private:
    int64_t take(int64_t chunks);
    void finish(uint32_t chunks);
    void wait(Ahead& ahead);

    int index_, threads_;
    Meeting& meeting_;
    uint64_t phase_ = 0;
    uint32_t total_ = 0;  // chunks of the phases so far
};

// Runs `body` on the caller and on up to threads - 1 others at once; returns when all that began have ended. Where another
// thread's call has the workers, the caller runs alone.
void run_team(int threads, const std::function<void(Team&)>& body);

}  // namespace llmk
