// Structs of kernel arguments as Python classes: what csrc/cpu and csrc/cuda share of their bindings.
//
// A class is made with keyword arguments, its fields can be changed afterwards, and a kernel takes the object:
//
//     args = cpu.RowsForward(x=x.data_ptr(), rows=16, ...)
//     cpu.rows_forward(args)
//
// so that arguments are read once for many launches. Pointers are addresses as int, 0 for null; sizes and strides,
// which count elements, are int. The object keeps no tensor alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "element.h"

namespace lcc {

namespace py = pybind11;

// csrc and lcconformer/extension.py agree on this number; add 1 when names, fields or their meaning change.
constexpr int kInterface = 11;

struct ArgumentName {
    const char *owner, *name;

    [[noreturn]] void refuse(py::handle got, const std::string& expected) const {
        throw py::type_error(std::string(owner) + ": " + name + " is " + py::repr(got).cast<std::string>() + " (" +
                             Py_TYPE(got.ptr())->tp_name + "); expected " + expected);
    }
};

template <class V>
void from_python(py::handle from, V& to, const ArgumentName& where) {
    if constexpr (std::is_pointer_v<V>) {
        const auto address = PyLong_Check(from.ptr()) ? PyLong_AsUnsignedLongLong(from.ptr()) : 0;
        if (!PyLong_Check(from.ptr()) || PyErr_Occurred()) {
            PyErr_Clear();
            where.refuse(from, "an address as int, 0 for null");
        }
        to = reinterpret_cast<V>(static_cast<uintptr_t>(address));
    } else if constexpr (std::is_integral_v<V>) {
        const auto value = PyLong_Check(from.ptr()) ? PyLong_AsUnsignedLongLong(from.ptr()) : 0;
        const auto most = static_cast<unsigned long long>(std::numeric_limits<V>::max());
        if (!PyLong_Check(from.ptr()) || PyErr_Occurred() || value > most) {
            PyErr_Clear();
            where.refuse(from, "an int from 0 to " + std::to_string(most));
        }
        to = static_cast<V>(value);
    } else if constexpr (std::is_floating_point_v<V>) {
        const double value = PyFloat_AsDouble(from.ptr());
        if (PyErr_Occurred()) {
            PyErr_Clear();
            where.refuse(from, "a float");
        }
        to = static_cast<V>(value);
    } else {
        py::detail::make_caster<V> caster;
        if (from.is_none() || !caster.load(from, false)) {
            const auto* type = py::detail::get_type_info(typeid(V));
            where.refuse(from, type == nullptr ? "another class" : type->type->tp_name);
        }
        to = py::detail::cast_op<V&>(caster);
    }
}

template <class V>
py::object to_python(V& from, py::handle owner) {
    if constexpr (std::is_pointer_v<V>) {
        return py::int_(reinterpret_cast<uintptr_t>(from));
    } else if constexpr (std::is_class_v<V>) {
        return py::cast(&from, py::return_value_policy::reference_internal, owner);  // its fields can be set, too
    } else {
        return py::cast(from);
    }
}

// The Python class of S. A constructor call must give the required fields; the others start as S has them.
template <class S>
class Arguments {
   public:
    Arguments(py::module_& m, const char* name, const char* doc) : class_(m, name, doc) {
        owner() = name;
        fields().clear();
        class_.def(py::init(&Arguments::make));
    }

    template <auto Member>
    Arguments& required(const char* name) {
        return add<Member>(name, true);
    }

    template <auto Member>
    Arguments& optional(const char* name) {
        return add<Member>(name, false);
    }

   private:
    struct Field {
        const char* name;
        PyObject* key;  // the name as an interned str, as the names of keyword arguments are
        bool required;
        void (*set)(S& object, py::handle value, const ArgumentName& where);
        py::object (*get)(S& object, py::handle owner);
    };

    static std::vector<Field>& fields() {
        static std::vector<Field> fields;
        return fields;
    }
    static const char*& owner() {
        static const char* name = nullptr;
        return name;
    }

    template <auto Member>
    Arguments& add(const char* name, bool required) {
        const size_t i = fields().size();
        fields().push_back(
            {name, PyUnicode_InternFromString(name), required,
             [](S& object, py::handle value, const ArgumentName& where) { from_python(value, object.*Member, where); },
             [](S& object, py::handle owner) { return to_python(object.*Member, owner); }});
        // py::handle instead of S&: one instance of pybind11's templates for all fields of all classes
        class_.def_property(name,
                            py::cpp_function([i](py::handle self) { return fields()[i].get(self.cast<S&>(), self); }),
                            py::cpp_function([i](py::handle self, py::handle value) {
                                fields()[i].set(self.cast<S&>(), value, {owner(), fields()[i].name});
                            }));
        return *this;
    }

    // `next` is where the search starts: callers mostly give fields in their order
    static size_t find(PyObject* key, size_t next) {
        const std::vector<Field>& all = fields();
        for (size_t n = 0; n < all.size(); ++n) {
            const size_t i = (next + n) % all.size();
            if (all[i].key == key) return i;
        }
        for (size_t i = 0; i < all.size(); ++i) {
            if (PyUnicode_CompareWithASCIIString(key, all[i].name) == 0) return i;
        }
        return all.size();
    }

    static S make(const py::kwargs& given) {
        const std::vector<Field>& all = fields();
        S object{};
        std::vector<bool> seen(all.size());
        size_t next = 0;
        Py_ssize_t at = 0;
        PyObject *key, *value;
        while (PyDict_Next(given.ptr(), &at, &key, &value)) {
            const size_t i = find(key, next);
            if (i == all.size()) {
                throw py::type_error(std::string(owner()) + ": there is no argument " +
                                     py::repr(key).cast<std::string>() + "; there are " +
                                     names([](size_t) { return true; }));
            }
            all[i].set(object, value, {owner(), all[i].name});
            seen[i] = true;
            next = i + 1;
        }
        for (size_t i = 0; i < all.size(); ++i) {
            if (all[i].required && !seen[i]) {
                throw py::type_error(std::string(owner()) + ": missing " +
                                     names([&](size_t j) { return all[j].required && !seen[j]; }));
            }
        }
        return object;
    }

    template <class Chosen>
    static std::string names(Chosen chosen) {
        std::string text;
        for (size_t i = 0; i < fields().size(); ++i) {
            if (chosen(i)) text += (text.empty() ? "" : ", ") + std::string(fields()[i].name);
        }
        return text;
    }

    py::class_<S> class_;
};

// `launch(args)` in Python, without the GIL
template <class S, class Launch>
void bind_launch(py::module_& m, const char* name, Launch launch) {
    m.def(
        name,
        [launch](const S& args) {
            py::gil_scoped_release release;
            launch(args);
        },
        py::arg("args"), py::pos_only());
}

inline void bind_element(py::module_& m) {
    py::enum_<Element>(m, "Element", "dtype of the big tensors of a kernel")
        .value("float32", Element::float32)
        .value("float16", Element::float16)
        .value("bfloat16", Element::bfloat16);
}

}  // namespace lcc
