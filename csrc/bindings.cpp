// Python in, kernels out: turns torch tensors into `Tensor` views and calls the registered kernels.
// The only file that includes pybind11; compiled once for all instruction sets.

#include <pybind11/pybind11.h>

#include "buffer.h"
#include "dlpack.h"
#include "pool.h"
#include "tensor.h"

namespace py = pybind11;

namespace llmkern {
namespace {

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
};

const Names& names() {
  static const Names n;
  return n;
}

py::object steal(PyObject* p) {
  if (!p) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(p);
}

DType dtype_of(PyObject* tensor) {
  static const std::vector<std::pair<PyObject*, DType>> table = [] {
    py::module_ torch = py::module_::import("torch");
    std::vector<std::pair<PyObject*, DType>> t;
    auto add = [&](const char* name, DType d) { t.emplace_back(py::object(torch.attr(name)).release().ptr(), d); };
    add("float32", DType::f32), add("bfloat16", DType::bf16), add("float16", DType::f16);
    add("float64", DType::f64), add("int64", DType::i64), add("int32", DType::i32);
    add("uint8", DType::u8), add("int8", DType::i8), add("bool", DType::boolean);
    return t;
  }();
  py::object dtype = steal(PyObject_GetAttr(tensor, names().dtype));
  for (auto& [object, d] : table)
    if (object == dtype.ptr()) return d;
  throw py::type_error("llmkern: no CPU kernel takes a tensor of dtype " + py::str(dtype).cast<std::string>());
}

void copy_ints(PyObject* tuple, int64_t* to, Py_ssize_t n) {
  for (Py_ssize_t i = 0; i < n; ++i) to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
}

Tensor view(PyObject* object) {
  Tensor t;
  py::object pointer = steal(PyObject_CallMethodNoArgs(object, names().data_ptr));
  py::object shape = steal(PyObject_GetAttr(object, names().shape));
  py::object stride = steal(PyObject_CallMethodNoArgs(object, names().stride));
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims > Tensor::max_dims) throw py::value_error("llmkern: a CPU kernel got more than 6 dimensions");
  t.data = PyLong_AsVoidPtr(pointer.ptr());
  t.dtype = dtype_of(object);
  t.dims = static_cast<int>(dims);
  copy_ints(shape.ptr(), t.size, dims);
  copy_ints(stride.ptr(), t.stride, dims);
  return t;
}

Value convert(PyObject* o) {
  Value v;
  if (o == Py_None) {
    v.none = true;
  } else if (PyBool_Check(o) || PyLong_Check(o)) {
    v.integer = PyLong_AsLongLong(o);
    v.real = static_cast<double>(v.integer);
  } else if (PyFloat_Check(o)) {
    v.real = PyFloat_AS_DOUBLE(o);
  } else if (PyUnicode_Check(o)) {
    v.text = PyUnicode_AsUTF8(o);
  } else if (PyList_Check(o) || PyTuple_Check(o)) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(o); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(o, i);
      if (PyBool_Check(item))
        v.flags.push_back(item == Py_True);
      else
        v.tensors.push_back(item == Py_None ? Tensor{} : view(item));
    }
  } else {
    v.tensor = view(o);
  }
  return v;
}

void run(const Kernel& kernel, const py::args& args) {
  if (args.size() != kernel.arity)
    throw py::type_error(std::string(kernel.name) + ": got " + std::to_string(args.size()) +
                         " arguments, expected " + std::to_string(kernel.arity));
  std::vector<Value> values(args.size());
  for (size_t i = 0; i < args.size(); ++i) values[i] = convert(PyTuple_GET_ITEM(args.ptr(), i));
  if (PyErr_Occurred()) throw py::error_already_set();
  py::gil_scoped_release release;
  kernel.call(values.data());
}

// An uninitialised tensor in memory of the pool, as a DLPack capsule; it goes back when the tensor dies.
py::object empty(const py::object& like) {
  const Tensor t = view(like.ptr());
  struct Owner {
    DLManagedTensor managed;
    int64_t size[Tensor::max_dims], stride[Tensor::max_dims];
    size_t bytes;
  };
  auto* owner = new Owner{};
  owner->bytes = t.bytes();
  DLTensor& tensor = owner->managed.dl_tensor;
  tensor.data = Pool::shared().take(owner->bytes);
  tensor.device = {kDLCPU, 0};
  tensor.ndim = t.dims;
  tensor.dtype = t.dtype == DType::bf16 ? DLDataType{kDLBfloat, 16, 1}
                                        : DLDataType{kDLFloat, uint8_t(t.dtype == DType::f32 ? 32 : 16), 1};
  tensor.shape = std::copy_n(t.size, t.dims, owner->size) - t.dims;
  tensor.strides = std::copy_n(t.stride, t.dims, owner->stride) - t.dims;
  owner->managed.manager_ctx = owner;
  owner->managed.deleter = [](DLManagedTensor* self) {
    auto* o = static_cast<Owner*>(self->manager_ctx);
    Pool::shared().give(self->dl_tensor.data, o->bytes);
    delete o;
  };
  // a consumer renames the capsule and owns the tensor from then on
  return steal(PyCapsule_New(&owner->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  }));
}

}  // namespace
}  // namespace llmkern

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of llmkern for one CPU instruction set";
  for (const llmkern::Kernel& kernel : llmkern::kernels())
    m.def(kernel.name, [kernel](const py::args& args) { llmkern::run(kernel, args); });
  m.def("empty", &llmkern::empty);
  m.def("pool_limit", [](size_t bytes) { llmkern::Pool::shared().limit(bytes); });
  m.def("pool_release", [] { llmkern::Pool::shared().release(0); });
  m.def("pool_kept", [] { return llmkern::Pool::shared().kept(); });
  m.def("scratch_held", [] { return llmkern::Buffer::held(); });
}
