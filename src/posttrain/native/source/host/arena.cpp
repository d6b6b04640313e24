// Large tensors of a CPU in an arena of their own, instead of glibc's heap.
//
// glibc either gives a large block's pages back to the kernel when it is freed, and at the next step waits for fresh,
// zeroed ones; or it keeps them, in one heap with millions of small objects, of which one that stays cuts what is free
// into pieces too small for the next large block. Here large blocks have no small ones between them, freed ones keep
// their pages, and a block that needs fresh pages takes as many from free blocks as are more than the most that was
// ever in use, and a little: what is resident follows what is in use and not how well blocks happen to fit.
//
// Best fit, neighbours joined on freeing. Pages are counted by chunks of 2 MiB, asked of the kernel as huge ones.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr size_t LARGE = 64 << 10;   // smaller tensors are glibc's
constexpr size_t CHUNK = 2 << 20;
constexpr size_t LINE = 64;
constexpr size_t STAGGER = 2 * LINE;  // blocks of whole pages would begin on the same cache lines, all of them
constexpr size_t SPLINTER = 4 << 10;  // a smaller rest stays with its block
constexpr size_t SLACK = 16;          // one part of so many may be resident beyond the most in use
const uintptr_t ANCHORS[] = {0x200000000000, 0x280000000000, 0x300000000000, 0x2000000000};  // far from all else

struct Statistics {
    size_t in_use, peak, resident, mapped;
};

class Arena final : public c10::Allocator {
   public:
    static Arena& instance() {
        static Arena* arena = new Arena();  // blocks outlive every destructor
        return *arena;
    }

    c10::DataPtr allocate(size_t bytes) override {
        if (bytes >= LARGE && keeps_) {
            if (void* block = take(bytes)) {
                c10::profiledCPUMemoryReporter().New(block, bytes);
                return {block, block, &give_away, c10::Device(c10::DeviceType::CPU)};
            }
        }
        return fallback_->allocate(bytes);  // and its error where there is no memory
    }

    c10::DeleterFnPtr raw_deleter() const override { return &give_away; }

    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

    void keep(bool keeps) {
        keeps_ = keeps;
        if (!keeps) give_back();
    }

    // Pages of all that is free, and their addresses, so that they can be had elsewhere under a limit on addresses too.
    void give_back() {
        std::lock_guard<std::mutex> guard(mutex_);
        release(SIZE_MAX);
        peak_ = in_use_;
        const std::vector<std::pair<uintptr_t, size_t>> all(by_address_.begin(), by_address_.end());
        for (auto [address, size] : all) {
            const uintptr_t begin = (address + CHUNK - 1) / CHUNK * CHUNK, stop = (address + size) / CHUNK * CHUNK;
            if (begin >= stop || munmap(reinterpret_cast<void*>(begin), stop - begin) != 0) continue;
            mapped_ -= stop - begin;
            forget(by_address_.find(address));
            if (begin > address) remember(address, begin - address);
            if (address + size > stop) remember(stop, address + size - stop);
        }
    }

    Statistics statistics() {
        std::lock_guard<std::mutex> guard(mutex_);
        return {in_use_, peak_, resident_, mapped_};
    }

    bool is_ready() const { return fallback_->raw_deleter() != nullptr; }

    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

   private:
    using Blocks = std::map<uintptr_t, size_t>;

    Arena() : fallback_(c10::GetDefaultCPUAllocator()) {}

    uintptr_t end() const { return base_ + is_resident_.size() * CHUNK; }

    void* take(size_t bytes) {
        if (bytes > SIZE_MAX / 2) return nullptr;
        size_t size = (bytes + LINE - 1) / LINE * LINE + STAGGER;
        std::lock_guard<std::mutex> guard(mutex_);
        auto fits = by_size_.lower_bound({size, 0});
        if (fits == by_size_.end()) {
            if (!grow(size)) return nullptr;
            fits = by_size_.lower_bound({size, 0});
        }
        auto [whole, address] = *fits;
        forget(by_address_.find(address));
        if (whole - size >= SPLINTER) {
            remember(address + size, whole - size);
        } else {
            size = whole;
        }
        taken_.emplace(address, size);
        in_use_ += size;
        if (in_use_ > peak_) peak_ = in_use_;
        touch(address, size);
        size_t allowed = peak_ + peak_ / SLACK + CHUNK;
        if (resident_ > allowed) release(resident_ - allowed);
        return reinterpret_cast<void*>(address);
    }

    static void give_away(void* block) {
        Arena& arena = instance();
        const uintptr_t address = reinterpret_cast<uintptr_t>(block);
        if (!arena.holds(address)) return arena.fallback_->raw_deleter()(block);
        c10::profiledCPUMemoryReporter().Delete(block);  // before somebody else may have this address
        arena.put_back(address);
    }

    bool holds(uintptr_t address) {
        std::lock_guard<std::mutex> guard(mutex_);
        return taken_.count(address) > 0;
    }

    void put_back(uintptr_t address) {
        std::lock_guard<std::mutex> guard(mutex_);
        auto found = taken_.find(address);
        size_t size = found->second;
        taken_.erase(found);
        in_use_ -= size;
        auto after = by_address_.lower_bound(address);
        if (after != by_address_.end() && address + size == after->first) {
            size += after->second;
            auto next = std::next(after);
            forget(after);
            after = next;
        }
        if (after != by_address_.begin()) {
            auto before = std::prev(after);
            if (before->first + before->second == address) {
                address = before->first;
                size += before->second;
                forget(before);
            }
        }
        remember(address, size);
    }

    void remember(uintptr_t address, size_t size) {
        by_address_.emplace(address, size);
        by_size_.emplace(size, address);
    }

    void forget(Blocks::iterator block) {
        by_size_.erase({block->second, block->first});
        by_address_.erase(block);
    }

    // Enough addresses at the end for a block of this size.
    bool grow(size_t size) {
        auto last = by_address_.empty() ? by_address_.end() : std::prev(by_address_.end());
        bool at_end = last != by_address_.end() && last->first + last->second == end();
        size_t missing = size - (at_end ? last->second : 0), bytes = (missing + CHUNK - 1) / CHUNK * CHUNK;
        is_resident_.reserve(is_resident_.size() + bytes / CHUNK);
        uintptr_t begin = map(bytes);
        if (begin == 0) return false;
        mapped_ += bytes;
        is_resident_.resize(is_resident_.size() + bytes / CHUNK, false);
        if (at_end) {
            begin = last->first;
            bytes += last->second;
            forget(last);
        }
        remember(begin, bytes);
        return true;
    }

    // 0 where there is no memory, or something else is there.
    uintptr_t map(size_t bytes) {
        if (base_ != 0) return map_at(end(), bytes);
        for (uintptr_t anchor : ANCHORS) {
            if (map_at(anchor, bytes) != 0) return base_ = anchor;
        }
        return 0;
    }

    static uintptr_t map_at(uintptr_t wanted, size_t bytes) {
        void* hint = reinterpret_cast<void*>(wanted);
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
        void* got = mmap(hint, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (got == MAP_FAILED) return 0;
        if (got != hint) {  // an old kernel takes the address for a hint
            munmap(got, bytes);
            return 0;
        }
        madvise(got, bytes, MADV_HUGEPAGE);
        return wanted;
    }

    void touch(uintptr_t address, size_t size) {
        for (size_t chunk = (address - base_) / CHUNK; chunk <= (address + size - 1 - base_) / CHUNK; ++chunk) {
            if (!is_resident_[chunk]) {
                is_resident_[chunk] = true;
                resident_ += CHUNK;
            }
        }
    }

    // Give back pages of free blocks, so many bytes or all there are; of small blocks first, which fit least.
    void release(size_t bytes) {
        for (auto block = by_size_.lower_bound({CHUNK, 0}); block != by_size_.end() && bytes > 0; ++block) {
            auto [size, address] = *block;
            size_t first = (address - base_ + CHUNK - 1) / CHUNK, last = (address + size - base_) / CHUNK;
            for (size_t chunk = first; chunk < last && bytes > 0; ++chunk) {
                if (!is_resident_[chunk]) continue;
                madvise(reinterpret_cast<void*>(base_ + chunk * CHUNK), CHUNK, MADV_DONTNEED);
                is_resident_[chunk] = false;
                resident_ -= CHUNK;
                bytes -= bytes < CHUNK ? bytes : CHUNK;
            }
        }
    }

    c10::Allocator* const fallback_;
    std::atomic<bool> keeps_ = true;
    std::mutex mutex_;
    uintptr_t base_ = 0;
    size_t in_use_ = 0, peak_ = 0, resident_ = 0, mapped_ = 0;
    std::vector<bool> is_resident_;  // of each chunk
    Blocks by_address_;              // free blocks
    std::set<std::pair<size_t, uintptr_t>> by_size_;
    std::unordered_map<uintptr_t, size_t> taken_;
};

}  // namespace

extern "C" {

// 0 where torch allocates by it from now on.
int posttrain_arena_install() {
    Arena& arena = Arena::instance();
    if (c10::GetCPUAllocator() == &arena) return 0;
    if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator() || !arena.is_ready()) return 1;  // somebody else's
    pthread_atfork([] { Arena::instance().lock(); }, [] { Arena::instance().unlock(); },
                   [] { Arena::instance().unlock(); });
    c10::SetCPUAllocator(&arena, UINT8_MAX);
    return c10::GetCPUAllocator() == &arena ? 0 : 2;
}

void posttrain_arena_keep(int keeps) { Arena::instance().keep(keeps != 0); }

void posttrain_arena_give_back() { Arena::instance().give_back(); }

// Bytes in use, the most since what was free was given back, resident and mapped.
void posttrain_arena_statistics(size_t* out) {
    Statistics now = Arena::instance().statistics();
    std::memcpy(out, &now, sizeof now);
}

}
