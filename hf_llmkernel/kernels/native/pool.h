// Threads that stay between calls, and the phases of a call that they share out among themselves.
//
// A phase ends when its chunks are done, not when all threads have come: one that the system has put aside while it
// holds no chunk delays nobody, and whoever is there does the work. Waiting is a short spin, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace llmk {

struct alignas(64) Phase {
    std::atomic<uint32_t> claimed{0};
    std::atomic<uint32_t> done{0};
    std::atomic<uint32_t> sleepers{0};
};

// One thread's way through the phases of a call. Every thread runs the same code, so phases need no names.
class Team {
  public:
    Team(int threads, Phase* phases) : threads_(threads), phase_(phases) {}

    int threads() const { return threads_; }

    // The chunk of the next phase that this thread will probably be given.
    int64_t probable_chunk() const { return phase_->claimed.load(std::memory_order_relaxed); }

    // Runs chunk(0) ... chunk(chunks - 1), each once, on whichever thread comes first, after that thread's prepare().
    // A late thread may run prepare() on what later phases are writing already, but then it gets no chunk.
    template <class Prepare, class Chunk>
    void run(int64_t chunks, Prepare&& prepare, Chunk&& chunk) {
        Phase& phase = *phase_++;
        const auto total = static_cast<uint32_t>(chunks);
        if (phase.claimed.load(std::memory_order_relaxed) < total) {
            prepare();
            for (uint32_t index; (index = phase.claimed.fetch_add(1, std::memory_order_relaxed)) < total;) {
                chunk(static_cast<int64_t>(index));
                finish(phase, total);
            }
        }
        wait(phase, total);
    }

  private:
    static void finish(Phase& phase, uint32_t total);
    static void wait(Phase& phase, uint32_t total);

    int threads_;
    Phase* phase_;
};

// Runs `body` on the caller and on up to threads - 1 others at once; returns when all that began have ended. `phases` is
// at least the number of phases of the body. Where another thread's call has the workers, the caller runs alone.
void run_team(int threads, int64_t phases, const std::function<void(Team&)>& body);

}  // namespace llmk
