// Threads that help the caller with pieces of work.
//
// XLA runs a decode step as hundreds of short calls, so handing over has to cost next to nothing, and a helper that is
// late must not hold anybody up: people run this on busy laptops. Hence the caller works too, takes whatever the helpers
// have not taken, and waits only for pieces that somebody has begun. If another caller has the helpers (several emulated
// devices run at once), it works alone. So nothing here can deadlock.
#pragma once
#include <cstdint>

namespace jaxllm {

// Calls work(argument, i) for every i below `pieces` and returns when all calls have returned.
void in_parallel(int64_t pieces, void (*work)(const void*, int64_t), const void* argument);

template <class F>
void in_parallel(int64_t pieces, const F& work) {
  in_parallel(pieces, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &work);
}

int threads();                // how many work at most, the caller included
void use_threads(int count);  // changes that, between calls

}  // namespace jaxllm
