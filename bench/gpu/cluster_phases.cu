// What an exchange costs within the cluster-resident loop of csrc/cuda: the feed-forward of its layer, weights in shared
// memory, is two phases, each a product and an exchange of all 16 blocks. Prints lines "name value"; the design is to
// live if a phase takes no more than 1.5 us. Its numbers are checked first. With LCC_EMULATION a C++ compiler builds it,
// the emulator runs it (the argument is the seed), and nothing is timed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/cluster_loop.cuh"

namespace {

using namespace lcc::cuda;

constexpr int kRounds = 1000;
constexpr double kMostUs = 1.5;

struct Phases {
    const void* x;  // [16, 256]
    LoopPart norm, up, down;
    void* out;  // as x
    int rounds;
    bool products;  // else the barriers alone
};

__global__ void __launch_bounds__(kLoopThreads, 1) phases(const Phases op) {
#if defined(LCC_EMULATION) || __CUDA_ARCH__ == 900  // sm_90 and 90a
    lcc::SharedMemory shared;
    LoopBlock block(shared, 1e-5f);
    const lcc::Shared up = shared.take(kHiddenOwn * kLoopWidth / 2), down = shared.take(kLoopWidth * kHiddenOwn / 2);
    load_up(up, op.up, block.rank);
    load_down(down, op.down, block.rank);
    lcc::commit_copies();
    lcc::wait_for_copies<0>();
    const float2 up_bias = pair_of(op.up.bias, hidden_column(block.rank));
    const float2 down_bias = pair_of(op.down.bias, block.owns() ? block.own_column() : 0);
    const int frame = static_cast<int>(threadIdx.x) / 16;
    Affine norm(op.norm);
    block.set_stream(Sixteen::of_vector(elements(op.x) + frame * kLoopWidth));
    __syncthreads();
    block.take_stream();
    for (int round = 0; round < op.rounds; ++round) {
        if (op.products) {
            block.normalise(norm);
            norm = block.feed_forward(up, up_bias, down, down_bias, op.norm);
        } else {
            block.meet();
            block.meet();
        }
    }
    if (frame == block.rank) {
        auto* out = static_cast<lcc::Eight<Bf16>*>(op.out) + frame * kLoopWidth / 8 + threadIdx.x % 16;
        const Sixteen stream = block.stream();
        out[0] = stream.parts[0];
        out[16] = stream.parts[1];
    }
    lcc::cluster_arrive();
    lcc::cluster_wait();
#else
    asm volatile("trap;");
#endif
}

void run(const Phases& op) {
    lcc::launch_clusters("cluster_phases", 0, phases, kLoopBlocks, dim3(kLoopBlocks), dim3(kLoopThreads),
                         cluster_loop_shared(), 0, op);
}

std::vector<Bf16> numbers(int count, double scale, double shift = 0.0) {
    static unsigned state = 1;
    std::vector<Bf16> values(count);
    for (Bf16& value : values) {
        state = state * 1664525u + 1013904223u;
        const float drawn = static_cast<float>(shift + scale * (static_cast<int>(state >> 8) / 8388608.0 - 1.0));
        uint32_t bits;
        std::memcpy(&bits, &drawn, sizeof bits);
        const auto upper = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        std::memcpy(&value, &upper, sizeof upper);
    }
    return values;
}

double to_double(const Bf16& value) {
    uint16_t upper;
    std::memcpy(&upper, &value, sizeof upper);
    const uint32_t bits = uint32_t{upper} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct Model {
    std::vector<Bf16> x = numbers(kLoopFrames * kLoopWidth, 2.0), weight = numbers(kLoopWidth, 0.5, 1.0),
                      bias = numbers(kLoopWidth, 0.5), up = numbers(kLoopHidden * kLoopWidth, 0.1),
                      up_bias = numbers(kLoopHidden, 0.5), down = numbers(kLoopWidth * kLoopHidden, 0.1),
                      down_bias = numbers(kLoopWidth, 0.5);

    // in double, and without rounding between the rounds
    std::vector<double> reference(int rounds) const {
        std::vector<double> stream(x.size()), h(kLoopWidth), hidden(kLoopHidden);
        for (size_t i = 0; i < x.size(); ++i) stream[i] = to_double(x[i]);
        for (int i = 0; i < rounds * kLoopFrames; ++i) {
            double* row = stream.data() + i % kLoopFrames * kLoopWidth;
            double mean = 0.0, variance = 0.0;
            for (int c = 0; c < kLoopWidth; ++c) mean += row[c] / kLoopWidth;
            for (int c = 0; c < kLoopWidth; ++c) variance += (row[c] - mean) * (row[c] - mean) / kLoopWidth;
            for (int c = 0; c < kLoopWidth; ++c) {
                h[c] = (row[c] - mean) / std::sqrt(variance + 1e-5) * to_double(weight[c]) + to_double(bias[c]);
            }
            for (int n = 0; n < kLoopHidden; ++n) {
                double sum = to_double(up_bias[n]);
                for (int c = 0; c < kLoopWidth; ++c) sum += h[c] * to_double(up[n * kLoopWidth + c]);
                hidden[n] = sum / (1.0 + std::exp(-sum));
            }
            for (int c = 0; c < kLoopWidth; ++c) {
                double sum = to_double(down_bias[c]);
                for (int n = 0; n < kLoopHidden; ++n) sum += hidden[n] * to_double(down[c * kLoopHidden + n]);
                row[c] += 0.5 * sum;
            }
        }
        return stream;
    }
};

#ifdef LCC_EMULATION
Bf16* on_device(const std::vector<Bf16>& values) { return const_cast<Bf16*>(values.data()); }
void fetch(std::vector<Bf16>&, const void*) {}
#else
Bf16* on_device(const std::vector<Bf16>& values) {
    void* memory = nullptr;
    lcc::check(cudaMalloc(&memory, values.size() * sizeof(Bf16)), "cudaMalloc");
    lcc::check(cudaMemcpy(memory, values.data(), values.size() * sizeof(Bf16), cudaMemcpyHostToDevice), "cudaMemcpy");
    return static_cast<Bf16*>(memory);
}
void fetch(std::vector<Bf16>& to, const void* from) {
    lcc::check(cudaMemcpy(to.data(), from, to.size() * sizeof(Bf16), cudaMemcpyDeviceToHost), "cluster_phases");
}

// microseconds of the fastest of 10 launches
double best_us(const Phases& op) {
    cudaEvent_t begin, end;
    lcc::check(cudaEventCreate(&begin), "cudaEventCreate");
    lcc::check(cudaEventCreate(&end), "cudaEventCreate");
    float best = 1e30f;
    for (int i = 0; i < 10; ++i) {
        lcc::check(cudaEventRecord(begin), "cudaEventRecord");
        run(op);
        lcc::check(cudaEventRecord(end), "cudaEventRecord");
        lcc::check(cudaEventSynchronize(end), "cluster_phases");
        float ms = 0.0f;
        lcc::check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        best = ms < best ? ms : best;
    }
    return best * 1e3;
}

// of one phase: the difference of two lengths leaves the launch and the loading of weights out
double phase_us(Phases op) {
    op.rounds = kRounds;
    const double once = best_us(op);
    op.rounds = 2 * kRounds;
    return (best_us(op) - once) / (2 * kRounds);
}
#endif

// the largest error over the largest value
double error_of(const Model& model, Phases op, std::vector<Bf16>& out) {
    op.rounds = 2;
    run(op);
    fetch(out, op.out);
    const std::vector<double> reference = model.reference(op.rounds);
    double error = 0.0, largest = 0.0;
    for (size_t i = 0; i < out.size(); ++i) {
        const double difference = std::fabs(to_double(out[i]) - reference[i]);
        error = difference <= error ? error : difference;  // NaN, too
        largest = std::fmax(largest, std::fabs(reference[i]));
    }
    return error / largest;
}

}  // namespace

int main(int count, char** arguments) {
    const Model model;
    std::vector<Bf16> out(model.x.size());
    const Phases op{on_device(model.x),
                    {on_device(model.weight), on_device(model.bias)},
                    {on_device(model.up), on_device(model.up_bias)},
                    {on_device(model.down), on_device(model.down_bias)},
                    on_device(out),
                    0,
                    true};
#ifdef LCC_EMULATION
    emulation::seed() = count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 0;
#else
    (void)count, (void)arguments;
    if (!lcc::cluster_fits("cluster_phases", phases, kLoopBlocks, dim3(kLoopThreads), cluster_loop_shared())) {
        std::fprintf(stderr, "no cluster of 16 blocks fits\n");
        return 1;
    }
#endif
    const double error = error_of(model, op, out);
    std::printf("relative_error %.3g\n", error);
    if (!(error < 0.01)) {
        std::fprintf(stderr, "the numbers are wrong: error %.3g of the largest value\n", error);
        return 1;
    }
#ifndef LCC_EMULATION
    Phases barriers = op;
    barriers.products = false;
    const double us = phase_us(op);
    std::printf("barrier_us %.4g\nphase_us %.4g\nlives %d\n", phase_us(barriers), us, us <= kMostUs);
#endif
    return 0;
}
