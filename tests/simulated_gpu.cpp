// A GPU for machines without one: tensors say "cuda", lie in main memory, and every operation runs on the CPU.
// Built and loaded by simulated_gpu.py, before PyTorch is imported. Mixing tensors of GPU and host fails as it does on a GPU.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <cstring>
#include <torch/library.h>

namespace {
const c10::Device kGpu(c10::DeviceType::CUDA, 0);

// The one device and its one stream, which autograd asks for.
struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Memory : public c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = n ? std::aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    return {data, data, &std::free, kGpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} memory;
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys,
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

// A tensor of the CPU over the same memory.
at::Tensor on_cpu(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  const auto options = t.options().device(at::kCPU);
  if (t.storage().nbytes() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  char* data = static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.element_size();
  return at::from_blob(data, t.sizes(), t.strides(), [t](void*) {}, options);
}

at::Tensor on_gpu(const at::Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  at::Tensor copy = empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {});
  if (t.numel()) on_cpu(copy).copy_(t);
  return copy;
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  on_cpu(self).copy_(on_cpu(source));
  return self;
}

at::Scalar local_scalar(const at::Tensor& t) { return on_cpu(t).item(); }

at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  if (bytes > self.storage().nbytes()) {
    auto larger = memory.allocate(bytes);
    if (self.storage().nbytes()) std::memcpy(larger.mutable_get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr(std::move(larger));
    self.storage().set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// Any other operation: on the CPU, over the same memory; what it makes is copied to new memory of the GPU.
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  bool any_gpu = false, any_host = false;
  const auto take = [&](const at::Tensor& t, bool may_mix) {
    if (t.defined()) (t.is_cuda() ? any_gpu : any_host) |= t.is_cuda() || (t.dim() > 0 && !may_mix);
    return on_cpu(t);
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      value = take(value.toTensor(), false);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(take(t, false));
      value = list;
    } else if (value.isOptionalTensorList()) {  // indices, which may lie on the host
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList().vec())
        list.push_back(t ? std::optional<at::Tensor>(take(*t, true)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(!(any_gpu && any_host), op.operator_name(), " has tensors on the GPU and on the host");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto& returns = schema.returns();
  const size_t first = stack->size() - returns.size();
  for (size_t r = 0; r < returns.size(); ++r) {
    auto& value = (*stack)[first + r];
    const auto* alias = returns[r].alias_info();
    if (alias != nullptr) {  // an argument that was written to is returned
      TORCH_CHECK(alias->isWrite(), op.operator_name(), " gives a view: it needs a function of its own here");
      for (size_t i = 0; i < count; ++i) {
        const auto* other = schema.arguments()[i].alias_info();
        if (other == nullptr || !(*other == *alias)) continue;
        if (given[i].isTensor() && value.toTensor().sizes() != given[i].toTensor().sizes()) {
          resize_(given[i].toTensor(), c10::fromIntArrayRefSlow(value.toTensor().sizes()), std::nullopt);
          on_cpu(given[i].toTensor()).copy_(value.toTensor());
        }
        value = given[i];
        break;
      }
    } else if (value.isTensor()) {
      value = on_gpu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(on_gpu(t));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
}
}  // namespace

namespace at {
struct SimulatedHooks : public CUDAHooksInterface {
  explicit SimulatedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, SimulatedHooks);
}  // namespace at
