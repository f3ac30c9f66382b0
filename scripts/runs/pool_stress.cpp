// Every chunk of every phase runs once, and after all of the phase before: three callers, teams of one to six threads.
//
//   g++ -std=c++17 -O1 -fsanitize=thread -I hf_llmkernel/kernels/native scripts/runs/pool_stress.cpp \
//       hf_llmkernel/kernels/native/pool.cpp -pthread -o pool_stress && ./pool_stress
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pool.h"

std::atomic<long> wrong{0};

void run_calls(unsigned seed, int calls) {
    for (int call = 0; call < calls; ++call) {
        const int threads = 1 + rand_r(&seed) % 6, phases = 1 + rand_r(&seed) % 40;
        std::vector<std::vector<int>> times;
        for (int phase = 0; phase < phases; ++phase) times.emplace_back(rand_r(&seed) % 30, 0);
        llmk::run_team(threads, [&](llmk::Team& team) {
            for (int phase = 0; phase < phases; ++phase)
                team.run(static_cast<int64_t>(times[phase].size()), [&](int64_t chunk) {
                    ++times[phase][chunk];
                    if (phase == 0) return;
                    for (const int before : times[phase - 1]) wrong += before != 1;
                });
        });
        for (const auto& phase : times)
            for (const int chunk : phase) wrong += chunk != 1;
    }
}

int main() {
    std::thread first(run_calls, 7, 3000), second(run_calls, 9, 3000);
    run_calls(3, 3000);
    first.join();
    second.join();
    std::printf("%ld chunks ran too soon, twice or never\n", wrong.load());
    return wrong != 0;
}
