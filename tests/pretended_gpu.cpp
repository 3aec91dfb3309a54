// A CUDA device in name only, for a build of PyTorch without CUDA: its memory is the host's, its kernels are the CPU's.
//
// What it is for: everything of the GPU's path but speed and nvcc. As on a GPU, tensors of two devices do not mix,
// memory that nobody wrote is garbage (NaN here), memory ends (`pretended_limit`, with torch.OutOfMemoryError), and
// what makes the host wait can be told (`pretended_warn`): reading a number, copying to the host, copying from memory
// that is not pinned, and operators whose result has a size that only the device knows.
//
// How: operators of CUDA tensors find no kernel of theirs, and fall back to `on_the_host`, which calls the CPU's kernel
// on views of the same memory. The few that make or reshape memory are below. pretended_gpu.py builds and loads it.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

using namespace c10;
using at::Tensor;

// ---- the device: what tests ask of it and tell it

static const Device CPU(DeviceType::CPU), GPU(DeviceType::CUDA, 0);
static std::atomic<int64_t> bytes{0}, peak{0}, limit{INT64_MAX};
static std::atomic<int> garbage{0xff};  // NaN in every float
static std::atomic<bool> warns{false};

extern "C" {
int64_t pretended_bytes() { return bytes; }
int64_t pretended_peak() { return peak; }
void pretended_reset_peak() { peak = bytes.load(); }
void pretended_limit(int64_t most) { limit = most; }
void pretended_garbage(int byte) { garbage = byte; }
void pretended_warn(bool on) { warns = on; }
}

static void waits(const std::string& what) {
  if (warns) TORCH_WARN("called a synchronizing CUDA operation: ", what);  // PyTorch's own words
}

// ---- memory, and the host's pinned memory

static std::mutex lock;
static std::map<const char*, size_t> pinned_blocks;  // address -> bytes

struct Block {
  void* data;
  size_t size;
  bool pinned;
};

static void drop(void* context) {
  auto* block = static_cast<Block*>(context);
  if (block->pinned) {
    std::lock_guard guard(lock);
    pinned_blocks.erase(static_cast<char*>(block->data));
  } else {
    bytes -= block->size;
  }
  free(block->data);
  delete block;
}

struct Memory final : Allocator {
  const bool pinned;
  explicit Memory(bool pinned) : pinned(pinned) {}

  DataPtr allocate(size_t size) override {
    if (!pinned && bytes + int64_t(size) > limit) {
      throw OutOfMemoryError({__func__, __FILE__, __LINE__}, "CUDA out of memory (pretended)");
    }
    auto* block = new Block{aligned_alloc(64, (size / 64 + 1) * 64), size, pinned};
    memset(block->data, garbage, size);
    if (pinned) {
      std::lock_guard guard(lock);
      pinned_blocks[static_cast<char*>(block->data)] = size;
    } else {
      bytes += size;
      for (int64_t seen = peak; seen < bytes && !peak.compare_exchange_weak(seen, bytes);) {}
    }
    return {block->data, block, &drop, pinned ? CPU : GPU};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }
};

static Memory memory(false), pinned_memory(true);

static bool is_pinned(const void* data) {
  std::lock_guard guard(lock);
  auto next = pinned_blocks.upper_bound(static_cast<const char*>(data));
  if (next == pinned_blocks.begin()) return false;
  auto [start, size] = *std::prev(next);
  return data < start + std::max<size_t>(size, 1);
}

// ---- what PyTorch asks of a device type

struct Guard : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
namespace at::detail {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
};
namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

// ---- from one device to the other

// The CPU's view of a tensor's memory, which it keeps alive.
static Tensor host(const Tensor& x) {
  if (!x.is_cuda()) return x;
  auto* kept = new Storage(x.storage());
  DataPtr data(kept->mutable_data(), kept, [](void* context) { delete static_cast<Storage*>(context); }, CPU);
  Storage storage(Storage::use_byte_size_t(), x.storage().nbytes(), std::move(data), GetAllocator(CPU.type()), true);
  auto view = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), x.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return view;
}

static Tensor gpu(const Tensor& x) {
  if (!x.defined() || x.is_cuda()) return x;
  Tensor made = at::detail::empty_strided_generic(
      x.sizes(), x.strides(), &memory, DispatchKeySet(DispatchKey::CUDA), x.scalar_type());
  host(made).copy_(x);
  return made;
}

static void on_the_host(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  static const std::set<std::string> sized_by_values = {"aten::nonzero", "aten::masked_select", "aten::_unique2"};
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  const std::vector<IValue> given(stack->begin() + first, stack->end());
  if (sized_by_values.count(name)) waits(name);

  auto view = [&](const Tensor& x) {
    // as on a GPU, a number may be anywhere
    TORCH_CHECK(!x.defined() || x.is_cuda() || x.dim() == 0, "Expected all tensors to be on the same device: ", name);
    return x.defined() ? host(x) : x;
  };
  for (size_t i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = view(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> views;
      for (const auto& x : value.toTensorVector()) views.push_back(view(x));
      value = views;
    } else if (value.isOptionalTensorList()) {
      List<std::optional<Tensor>> views;
      for (std::optional<Tensor> x : value.toOptionalTensorList()) {
        if (x && x->defined() && x->scalar_type() == at::kBool) waits(name + " by a mask");
        views.push_back(x ? std::optional(view(*x)) : x);
      }
      value = views;
    } else if (value.isDevice()) {
      value = CPU;
    }
  }
  // two operators that widen half precision on a GPU alone
  if ((name == "aten::_log_softmax" || name == "aten::_softmax") && (*stack)[first + 2].toBool()) {
    (*stack)[first] = (*stack)[first].toTensor().to(at::kFloat);
    (*stack)[first + 2] = false;
  }
  if (name == "aten::_log_softmax_backward_data" || name == "aten::_softmax_backward_data") {
    (*stack)[first + 3] = (*stack)[first].toTensor().scalar_type();
    if (arguments.size() == 5) (*stack)[first + 4] = at::empty_like((*stack)[first].toTensor());  // out
  }

  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);

  for (size_t r = 0; r < schema.returns().size(); ++r) {
    auto& value = (*stack)[first + r];
    const auto* alias = schema.returns()[r].alias_info();
    if (alias && alias->isWrite()) {  // an argument, written in place
      for (size_t i = 0; i < arguments.size(); ++i) {
        const auto* other = arguments[i].alias_info();
        if (!other || !(*other == *alias)) continue;
        if (value.isTensor() && host(given[i].toTensor()).data_ptr() != value.toTensor().data_ptr()) {  // and resized
          host(given[i].toTensor().resize_(value.toTensor().sizes())).copy_(value.toTensor());
        }
        value = given[i];
      }
    } else if (value.isTensor()) {
      value = gpu(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> made;
      for (const auto& x : value.toTensorVector()) made.push_back(gpu(x));
      value = made;
    }
  }
}

// ---- operators that make memory, or look at it from the host

using Layout_ = std::optional<Layout>;
using Device_ = std::optional<Device>;
using Dtype_ = std::optional<ScalarType>;

static ScalarType or_default(Dtype_ dtype) { return dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype())); }

static Tensor empty(IntArrayRef size, Dtype_ dtype, Layout_, Device_, std::optional<bool>,
                    std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::CUDA), or_default(dtype), format);
}

static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Dtype_ dtype, Layout_, Device_, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, DispatchKeySet(DispatchKey::CUDA), or_default(dtype));
}

static const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  const int64_t needed = (self.storage_offset() + multiply_integers(size)) * self.element_size();
  if (int64_t(self.storage().nbytes()) < needed) {
    auto data = memory.allocate(needed);
    memcpy(data.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr(std::move(data));
    self.storage().set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

static Tensor& set_(Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

static Tensor& set_storage(Tensor& self, Storage storage) {
  const int64_t size = storage.nbytes() / self.element_size();
  return set_(self, std::move(storage), 0, {size}, {1});
}

static Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.is_cuda()) {
    waits("a copy to the host");
  } else if (!source.is_cuda() && !(non_blocking && is_pinned(source.data_ptr()))) {
    waits("a copy from memory that is not pinned, or a blocking one");
  }
  host(self).copy_(host(source));
  return self;
}

static Scalar item(const Tensor& self) {
  waits("item");
  return host(self).item();
}

// Only GPUs have it.
static Tensor& addmm_out(const Tensor& self, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta,
                         const Scalar& alpha, Tensor& out) {
  TORCH_CHECK(self.is_cuda() && a.is_cuda() && b.is_cuda() && out.is_cuda(), "all tensors on the same device");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "mat1 and mat2 must have the same dtype");
  TORCH_CHECK(out.scalar_type() == dtype && self.scalar_type() == dtype, "self and out must have out_dtype");
  TORCH_CHECK(dtype == a.scalar_type() || (dtype == at::kFloat && a.element_size() == 2), "out_dtype");
  auto product = at::mm(host(a).to(dtype), host(b).to(dtype)).mul_(alpha);
  if (beta.toDouble() != 0) product.add_(host(self), beta);
  host(out).copy_(product);
  return out;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("addmm.dtype_out", TORCH_FN(addmm_out));
}
static const bool registered = (SetAllocator(DeviceType::CUDA, &memory), true);
