// Runs every CUDA kernel through the shim, beside the portable CPU kernel, and compares all memory.
//
// A program without Python, so that the sanitizers see little but the kernels. Buffers have exactly the
// size they need and lie at addresses as misaligned as the ops allow.
//
//   kernel_check [OP ...]      all ops, or these; prints the number of cases of each
#include "../cuda/ops.h"
#include "../math/scale.h"
#include "check.h"

namespace commrt::portable {
void block_encode(const BlockEncodeArgs&, std::int64_t, std::int64_t);
void block_decode(const BlockDecodeArgs&, std::int64_t, std::int64_t);
void loco_encode(const LocoEncodeArgs&, std::int64_t, std::int64_t);
void decode_average(const DecodeAverageArgs&, std::int64_t, std::int64_t);
void decode_average_encode(const DecodeAverageEncodeArgs&, std::int64_t, std::int64_t);
void rescale(const RescaleArgs&, std::int64_t, std::int64_t);
}  // namespace commrt::portable

namespace {

using namespace commrt;

struct Kind {
  int bits;
  bool mean_levels;
};
constexpr Kind kKinds[] = {{1, true}, {2, false}, {2, true}, {4, false}, {8, false}};
constexpr int kBlocks[] = {32, 64, 128, 256, 512, 1024};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

std::int64_t blocks_of(std::int64_t numel, int block) { return (numel + block - 1) / block; }
std::int64_t payload_bytes(std::int64_t num_blocks, int bits, int block) {
  return num_blocks * (code_bytes(bits, block) + 2);
}

// Numbers of every size, and now and then a block of zeros or one that is not finite.
std::vector<std::uint8_t> random_elements(std::int64_t numel, int block, DType dtype,
                                          std::mt19937& random) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(numel * element_size(dtype)) + 1);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < numel; ++i) {
    const std::int64_t index = i / block;
    float x = normal(random);
    if (index % 5 == 1) x *= 1e-38f;
    if (index % 5 == 2) x = 0.0f;
    if (index % 5 == 3 && i % block == 7) x = index % 2 ? INFINITY : NAN;
    if (dtype == DType::kFloat32) {
      std::memcpy(bytes.data() + 4 * i, &x, 4);
    } else {
      const std::uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
  }
  return bytes;
}

// Any codes, and scales that a payload can have, NaN among them.
std::vector<std::uint8_t> random_payload(std::int64_t num_blocks, int bits, int block,
                                         std::mt19937& random, bool has_nan = true) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(payload_bytes(num_blocks, bits, block)));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  std::uint8_t* scales = bytes.data() + num_blocks * code_bytes(bits, block);
  for (std::int64_t i = 0; i < num_blocks; ++i) {
    std::uint16_t scale = static_cast<std::uint16_t>(0x3c00 + random() % 0x200);
    if (i % 7 == 2) scale = 0;
    if (i % 7 == 3 && has_nan) scale = kScaleNaN;
    std::memcpy(scales + 2 * i, &scale, 2);
  }
  return bytes;
}

PayloadSlice slice(std::uint8_t* payload, std::int64_t num_blocks, int bits, int block) {
  return {payload,
          reinterpret_cast<std::uint16_t*>(payload + num_blocks * code_bytes(bits, block))};
}

std::string describe(const char* op, int bits, bool mean, int block, std::int64_t numel, int more) {
  return std::string(op) + " bits " + std::to_string(bits) + (mean ? " mean" : "") + " block " +
         std::to_string(block) + " numel " + std::to_string(numel) + " / " + std::to_string(more);
}

std::vector<std::int64_t> sizes(int block) { return {1, block - 1, 2 * block + 9, 2048 + block}; }

// Call body(kind, block, numel, dtype, index of the case).
template <typename Body>
void for_each_case(Body body) {
  int index = 0;
  for (const Kind kind : kKinds) {
    for (const int block : kBlocks) {
      for (const std::int64_t numel : sizes(block)) {
        for (const DType dtype : kDTypes) body(kind, block, numel, dtype, index++);
      }
    }
  }
}

// Some cases are aligned, others by one element only; payloads by any number of bytes.
int shift_of(DType dtype, int index) {
  return index % 2 ? static_cast<int>(element_size(dtype)) : 0;
}
int payload_shift(int index) { return index % 3 == 2 ? 1 + index % 7 : 0; }

void check_block_encode(Checks& checks, std::mt19937& random) {
  for_each_case([&](Kind kind, int block, std::int64_t numel, DType dtype, int index) {
    const std::int64_t num_blocks = blocks_of(numel, block);
    Buffer input(numel * element_size(dtype), shift_of(dtype, index));
    input.set(random_elements(numel, block, dtype, random).data());
    Buffer payload(payload_bytes(num_blocks, kind.bits, block), payload_shift(index));
    const BlockFormat format{kind.bits, block, kind.mean_levels};
    const Rounding rounding{kind.bits > 1 && index % 4 == 0, kSeed};
    const auto args = [&](std::uint8_t* from, std::uint8_t* to) {
      return BlockEncodeArgs{{from, dtype, numel, kFirstIndex},
                             slice(to, num_blocks, kind.bits, block),
                             format,
                             rounding};
    };
    portable::block_encode(args(input.cpu(), payload.cpu()), 0, num_blocks);
    cuda::block_encode(args(input.gpu(), payload.gpu()), num_blocks, {});
    checks.expect(describe("block_encode", kind.bits, kind.mean_levels, block, numel, index),
                  {&input, &payload});
  });
}

void check_loco_encode(Checks& checks, std::mt19937& random) {
  for_each_case([&](Kind kind, int block, std::int64_t numel, DType dtype, int index) {
    const int residual_bits = index % 5 < 2 ? 4 : 8;
    const std::int64_t num_blocks = blocks_of(numel, block);
    Buffer grad(numel * element_size(dtype), shift_of(dtype, index));
    grad.set(random_elements(numel, block, dtype, random).data());
    Buffer residual(payload_bytes(num_blocks, residual_bits, block), payload_shift(index + 1));
    residual.set(random_payload(num_blocks, residual_bits, block, random, false).data());
    Buffer payload(payload_bytes(num_blocks, kind.bits, block), payload_shift(index));
    const BlockFormat format{kind.bits, block, kind.mean_levels};
    const Rounding rounding{kind.bits > 1 && index % 4 == 0, kSeed};
    const auto args = [&](std::uint8_t* from, std::uint8_t* kept, std::uint8_t* to) {
      return LocoEncodeArgs{{from, dtype, numel, kFirstIndex},
                            slice(kept, num_blocks, residual_bits, block),
                            slice(to, num_blocks, kind.bits, block),
                            format,
                            rounding,
                            0.8f,
                            residual_bits};
    };
    portable::loco_encode(args(grad.cpu(), residual.cpu(), payload.cpu()), 0, num_blocks);
    cuda::loco_encode(args(grad.gpu(), residual.gpu(), payload.gpu()), num_blocks, {});
    checks.expect(describe("loco_encode", kind.bits, kind.mean_levels, block, numel, index),
                  {&grad, &residual, &payload});
  });
}

// Makes a stack of payloads, a stride apart that is no multiple of anything.
struct Stack {
  Stack(int count, std::int64_t num_blocks, int bits, int block, int index, std::mt19937& random)
      : count(count),
        stride(payload_bytes(num_blocks, bits, block) + index % 3),
        buffer(stride * count, payload_shift(index)),
        num_blocks(num_blocks),
        bits(bits),
        block(block) {
    std::vector<std::uint8_t> all;
    for (int rank = 0; rank < count; ++rank) {
      const auto payload = random_payload(num_blocks, bits, block, random);
      all.insert(all.end(), payload.begin(), payload.end());
      all.resize(static_cast<std::size_t>(stride * (rank + 1)));
    }
    buffer.set(all.data());
  }
  PayloadStack of(std::uint8_t* base) const {
    const PayloadSlice first = slice(base, num_blocks, bits, block);
    return {first.codes, first.scales, stride, count};
  }

  int count;
  std::int64_t stride;
  Buffer buffer;
  std::int64_t num_blocks;
  int bits, block;
};

void check_block_decode(Checks& checks, std::mt19937& random) {
  for_each_case([&](Kind kind, int block, std::int64_t numel, DType dtype, int index) {
    const std::int64_t num_blocks = blocks_of(numel, block);
    Buffer payload(payload_bytes(num_blocks, kind.bits, block), payload_shift(index));
    payload.set(random_payload(num_blocks, kind.bits, block, random).data());
    Buffer output(numel * element_size(dtype), shift_of(dtype, index));
    const BlockFormat format{kind.bits, block, kind.mean_levels};
    const auto args = [&](std::uint8_t* from, std::uint8_t* to) {
      return BlockDecodeArgs{
          slice(from, num_blocks, kind.bits, block), {to, dtype, numel, 0}, format};
    };
    portable::block_decode(args(payload.cpu(), output.cpu()), 0, num_blocks);
    cuda::block_decode(args(payload.gpu(), output.gpu()), num_blocks, {});
    checks.expect(describe("block_decode", kind.bits, false, block, numel, index),
                  {&payload, &output});
  });
}

void check_decode_average(Checks& checks, std::mt19937& random) {
  for_each_case([&](Kind kind, int block, std::int64_t numel, DType dtype, int index) {
    const std::int64_t num_blocks = blocks_of(numel, block);
    Stack stack(1 + index % 5, num_blocks, kind.bits, block, index, random);
    Buffer output(numel * element_size(dtype), shift_of(dtype, index));
    const BlockFormat format{kind.bits, block, kind.mean_levels};
    const auto args = [&](std::uint8_t* from, std::uint8_t* to) {
      return DecodeAverageArgs{stack.of(from), {to, dtype, numel, 0}, format};
    };
    portable::decode_average(args(stack.buffer.cpu(), output.cpu()), 0, num_blocks);
    cuda::decode_average(args(stack.buffer.gpu(), output.gpu()), num_blocks, {});
    checks.expect(describe("decode_average", kind.bits, false, block, numel, index),
                  {&stack.buffer, &output});
  });
}

void check_decode_average_encode(Checks& checks, std::mt19937& random) {
  int index = 0;
  for (const Kind kind : kKinds) {
    for (const Kind to : kKinds) {
      for (const int block : kBlocks) {
        const std::int64_t num_blocks = 1 + 2100 / block;
        Stack stack(1 + index % 4, num_blocks, kind.bits, block, index, random);
        Buffer output(payload_bytes(num_blocks, to.bits, block), payload_shift(index + 1));
        const auto args = [&](std::uint8_t* from, std::uint8_t* out) {
          return DecodeAverageEncodeArgs{stack.of(from),
                                         {kind.bits, block, false},
                                         slice(out, num_blocks, to.bits, block),
                                         {to.bits, block, to.mean_levels}};
        };
        portable::decode_average_encode(args(stack.buffer.cpu(), output.cpu()), 0, num_blocks);
        cuda::decode_average_encode(args(stack.buffer.gpu(), output.gpu()), num_blocks, {});
        checks.expect(describe("decode_average_encode", kind.bits, false, block, to.bits, index),
                      {&stack.buffer, &output});
        ++index;
      }
    }
  }
}

void check_rescale(Checks& checks, std::mt19937& random) {
  int index = 0;
  for (const int bits : {4, 8}) {
    for (const int block : kBlocks) {
      for (const float ratio : {0.5f, 3.0f, 1e-30f, 1e38f}) {
        const std::int64_t num_blocks = 1 + 40 * index;
        Buffer payload(payload_bytes(num_blocks, bits, block), payload_shift(index));
        payload.set(random_payload(num_blocks, bits, block, random, false).data());
        const auto args = [&](std::uint8_t* base) {
          return RescaleArgs{slice(base, num_blocks, bits, block).scales, &ratio, bits};
        };
        portable::rescale(args(payload.cpu()), 0, num_blocks);
        cuda::rescale(args(payload.gpu()), num_blocks, {});
        checks.expect(describe("rescale", bits, false, block, num_blocks, index), {&payload});
        ++index;
      }
    }
  }
}

struct Op {
  const char* name;
  void (*check)(Checks&, std::mt19937&);
};
constexpr Op kOps[] = {
    {"block_encode", check_block_encode},
    {"loco_encode", check_loco_encode},
    {"block_decode", check_block_decode},
    {"decode_average", check_decode_average},
    {"decode_average_encode", check_decode_average_encode},
    {"rescale", check_rescale},
    {"patch_apply", check_patch_apply},
    {"rans_encode", check_rans_encode},
    {"rans_decode", check_rans_decode},
    {"adam_mini", check_adam_mini},
    {"adamw", check_adamw},
    {"adan", check_adan},
    {"lion", check_lion},
    {"mofo", check_mofo},
    {"square_sums", check_square_sums},
    {"dither_quantise", check_dither_quantise},
    {"dither_dequantise", check_dither_dequantise},
    {"scale_rows", check_scale_rows},
    {"lmmse_combine", check_lmmse_combine},
    {"polar_transform", check_polar_transform},
    {"polar_decode", check_polar_decode},
    {"coset_llr", check_coset_llr},
    {"coset_decode", check_coset_decode},
    {"source_energies", check_source_energies},
    {"source_prediction", check_source_prediction},
    {"source_products", check_source_products},
    {"source_history", check_source_history},
    {"update_add", check_update_add},
};

}  // namespace

int main(int argc, char** argv) {
  Checks checks;
  for (const Op& op : kOps) {
    bool is_wanted = argc == 1;
    for (int i = 1; i < argc; ++i) is_wanted |= std::strcmp(argv[i], op.name) == 0;
    if (!is_wanted) continue;
    std::mt19937 random(1);
    try {
      op.check(checks, random);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", op.name, error.what());
      return 1;
    }
    checks.report(op.name);
  }
  return checks.failures() ? 1 : 0;
}
