#include "cpu/bindings.h"

#include <pybind11/stl.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lcc::cpu {
namespace {

int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const char* name : {"avx512bf16", "avx512", "avx2", "generic"})
        if (has_simd_level(name)) names.emplace_back(name);
    return names;
}

void set_simd_level(const std::string& name) {
    if (!use_simd_level(name.c_str())) throw py::value_error("this processor or build has no SIMD level " + name);
}

// what the types of the fields let through and no kernel can take
template <class S>
void check(const char* kernel, const S& args) {
    if (args.threads < 1) {
        throw std::invalid_argument(std::string(kernel) + ": threads is " + std::to_string(args.threads) +
                                    "; expected at least 1");
    }
    if (args.element == Element::float16) {
        throw std::invalid_argument(std::string(kernel) + ": element is float16; expected float32 or bfloat16");
    }
    if constexpr (std::is_same_v<S, Convert>) {
        if (args.to_element == Element::float16) {
            throw std::invalid_argument("convert: to_element is float16; expected float32 or bfloat16");
        }
    }
    if constexpr (std::is_same_v<S, RelposAttentionForward> || std::is_same_v<S, RelposAttentionPackPositions>) {
        if (args.products == Element::float16) {
            throw std::invalid_argument(std::string(kernel) + ": products is float16; expected float32 or bfloat16");
        }
    }
    if constexpr (std::is_same_v<S, RelposAttentionForward>) {
        if (args.products == Element::bfloat16 && args.element != Element::bfloat16) {
            throw std::invalid_argument(std::string(kernel) +
                                        ": products is bfloat16 and element float32; expected both bfloat16");
        }
    }
    if constexpr (std::is_same_v<S, RowsForward>) {
        if (args.element == Element::bfloat16 && args.merge.panels && args.merge.inputs % 2) {
            throw std::invalid_argument(std::string(kernel) + ": merge has " + std::to_string(args.merge.inputs) +
                                        " inputs; expected an even number with bfloat16");
        }
    }
}

void bind_parts(py::module_& m) {
    py::enum_<Activation>(m, "Activation", "Activation of feed-forward and convolution; gelu is the exact one")
        .value("silu", Activation::silu)
        .value("gelu", Activation::gelu)
        .value("relu", Activation::relu);
    py::enum_<Norm>(m, "Norm", "Norm inside glu_depthwise_conv")
        .value("none", Norm::none)
        .value("layer", Norm::layer)
        .value("running", Norm::running)
        .value("batch", Norm::batch)
        .value("group", Norm::group);
    Arguments<Heads>(m, "Heads", "[B, T, H, D], or packed [frames, H, D], with unit stride in D")
        .required<&Heads::data>("data")
        .required<&Heads::batch_stride>("batch_stride")
        .required<&Heads::frame_stride>("frame_stride")
        .required<&Heads::head_stride>("head_stride");
    Arguments<Matrix>(m, "Matrix", "y = x W + bias in panels of PANEL_COLUMNS columns")
        .required<&Matrix::panels>("panels")
        .required<&Matrix::bias>("bias")
        .required<&Matrix::inputs>("inputs")
        .required<&Matrix::columns>("columns")
        .optional<&Matrix::scales>("scales")
        .optional<&Matrix::starts>("starts");
    Arguments<Affine>(m, "Affine", "Weight and bias of a LayerNorm, [D]")
        .required<&Affine::weight>("weight")
        .required<&Affine::bias>("bias");
    py::class_<Dropout>(m, "Dropout",
                        "Address of the int64 seed, 0 for no dropout, and the probability of being dropped")
        .def(py::init([](uintptr_t seed, double p) {
                 if (!(p >= 0.0 && p <= 1.0))
                     throw py::value_error("Dropout: p is " + std::to_string(p) + "; expected 0 to 1");
                 return make_dropout(reinterpret_cast<const int64_t*>(seed), p);
             }),
             py::arg("seed"), py::arg("p"));
}

template <class S>
void add_relpos_attention(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::batch>("batch")
        .template required<&S::frames>("frames")
        .template required<&S::heads>("heads")
        .template required<&S::head_dim>("head_dim")
        .template required<&S::total_frames>("total_frames")
        .template required<&S::threads>("threads")
        .template required<&S::q>("q")
        .template required<&S::k>("k")
        .template required<&S::v>("v")
        .template optional<&S::pos>("pos")
        .template optional<&S::pos_frame_stride>("pos_frame_stride")
        .template optional<&S::pos_head_stride>("pos_head_stride")
        .template optional<&S::u>("u")
        .template optional<&S::v_bias>("v_bias")
        .template optional<&S::lengths>("lengths")
        .template optional<&S::cu_seqlens>("cu_seqlens")
        .template optional<&S::dropout>("dropout")
        .template required<&S::out>("out");
}

void bind_relpos_attention(py::module_& m) {
    using Forward = RelposAttentionForward;
    Arguments<Forward> forward(m, "RelposAttentionForward", "Arguments of relpos_attention_forward");
    add_relpos_attention(forward);
    forward.optional<&Forward::lse>("lse")
        .optional<&Forward::pos_panels>("pos_panels")
        .optional<&Forward::products>("products")
        .optional<&Forward::own_threads>("own_threads");

    using Backward = RelposAttentionBackward;
    Arguments<Backward> backward(m, "RelposAttentionBackward", "Arguments of relpos_attention_backward");
    add_relpos_attention(backward);
    backward.required<&Backward::lse>("lse")
        .required<&Backward::dout>("dout")
        .required<&Backward::dq>("dq")
        .required<&Backward::dk>("dk")
        .required<&Backward::dv>("dv")
        .optional<&Backward::dpos>("dpos")
        .optional<&Backward::du>("du")
        .optional<&Backward::dv_bias>("dv_bias");

    using Pack = RelposAttentionPackPositions;
    Arguments<Pack>(m, "RelposAttentionPackPositions", "Arguments of relpos_attention_pack_positions")
        .required<&Pack::element>("element")
        .required<&Pack::frames>("frames")
        .required<&Pack::heads>("heads")
        .required<&Pack::head_dim>("head_dim")
        .required<&Pack::threads>("threads")
        .required<&Pack::pos>("pos")
        .required<&Pack::pos_frame_stride>("pos_frame_stride")
        .required<&Pack::pos_head_stride>("pos_head_stride")
        .required<&Pack::pos_panels>("pos_panels")
        .required<&Pack::products>("products");
    m.def(
        "relpos_attention_position_size",
        [](Element products, int64_t frames, int64_t head_dim) {
            return kernels().relpos_attention_position_size(products, frames, head_dim);
        },
        "Elements of one head's pos_panels at the SIMD level in use.", py::arg("products"), py::arg("frames"),
        py::arg("head_dim"));
}

template <class S>
void add_glu_depthwise_conv(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::batch>("batch")
        .template required<&S::frames>("frames")
        .template required<&S::channels>("channels")
        .template required<&S::width>("width")
        .template required<&S::threads>("threads")
        .template required<&S::x>("x")
        .template required<&S::x_batch_stride>("x_batch_stride")
        .template required<&S::x_frame_stride>("x_frame_stride")
        .template required<&S::taps>("taps")
        .template optional<&S::lengths>("lengths")
        .template required<&S::norm>("norm")
        .template optional<&S::groups>("groups")
        .template optional<&S::norm_weight>("norm_weight")
        .template optional<&S::norm_bias>("norm_bias")
        .template required<&S::eps>("eps")
        .template required<&S::activation>("activation")
        .template optional<&S::mean>("mean")
        .template optional<&S::var>("var")
        .template optional<&S::count>("count");
}

void bind_glu_depthwise_conv(py::module_& m) {
    using Forward = GluDepthwiseConvForward;
    Arguments<Forward> forward(m, "GluDepthwiseConvForward", "Arguments of glu_depthwise_conv_forward");
    add_glu_depthwise_conv(forward);
    forward.optional<&Forward::bias>("bias").required<&Forward::out>("out").optional<&Forward::y>("y");
    forward.optional<&Forward::own_threads>("own_threads");

    using Backward = GluDepthwiseConvBackward;
    Arguments<Backward> backward(m, "GluDepthwiseConvBackward", "Arguments of glu_depthwise_conv_backward");
    add_glu_depthwise_conv(backward);
    backward.required<&Backward::y>("y")
        .required<&Backward::dout>("dout")
        .required<&Backward::dout_batch_stride>("dout_batch_stride")
        .required<&Backward::dout_frame_stride>("dout_frame_stride")
        .required<&Backward::dx>("dx")
        .required<&Backward::dtaps>("dtaps")
        .required<&Backward::dbias>("dbias")
        .optional<&Backward::dnorm>("dnorm");
}

void bind_residual_layer_norm(py::module_& m) {
    using Forward = ResidualLayerNormForward;
    Arguments<Forward>(m, "ResidualLayerNormForward", "Arguments of residual_layer_norm_forward")
        .required<&Forward::element>("element")
        .required<&Forward::rows>("rows")
        .required<&Forward::columns>("columns")
        .required<&Forward::threads>("threads")
        .required<&Forward::x>("x")
        .required<&Forward::x_row_stride>("x_row_stride")
        .optional<&Forward::y>("y")
        .optional<&Forward::y_row_stride>("y_row_stride")
        .required<&Forward::weight>("weight")
        .required<&Forward::bias>("bias")
        .optional<&Forward::s>("s")
        .required<&Forward::n>("n")
        .optional<&Forward::mean>("mean")
        .optional<&Forward::rstd>("rstd")
        .optional<&Forward::alpha>("alpha")
        .required<&Forward::eps>("eps")
        .optional<&Forward::dropout>("dropout");

    using Backward = ResidualLayerNormBackward;
    Arguments<Backward>(m, "ResidualLayerNormBackward", "Arguments of residual_layer_norm_backward")
        .required<&Backward::element>("element")
        .required<&Backward::rows>("rows")
        .required<&Backward::columns>("columns")
        .required<&Backward::threads>("threads")
        .required<&Backward::s>("s")
        .required<&Backward::s_row_stride>("s_row_stride")
        .required<&Backward::dn>("dn")
        .required<&Backward::dn_row_stride>("dn_row_stride")
        .required<&Backward::ds>("ds")
        .required<&Backward::ds_row_stride>("ds_row_stride")
        .required<&Backward::weight>("weight")
        .optional<&Backward::bias>("bias")
        .required<&Backward::mean>("mean")
        .required<&Backward::rstd>("rstd")
        .optional<&Backward::n>("n")
        .required<&Backward::dx>("dx")
        .optional<&Backward::dy>("dy")
        .required<&Backward::dparams>("dparams")
        .optional<&Backward::alpha>("alpha")
        .optional<&Backward::dropout>("dropout");
}

template <class S>
void add_feed_forward_elements(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::rows>("rows")
        .template required<&S::columns>("columns")
        .template required<&S::threads>("threads")
        .template optional<&S::dropout>("dropout")
        .template required<&S::out>("out");
}

void bind_feed_forward(py::module_& m) {
    using Forward = FeedForwardActivationForward;
    Arguments<Forward> activation(m, "FeedForwardActivationForward", "Arguments of feed_forward_activation_forward");
    add_feed_forward_elements(activation);
    activation.required<&Forward::activation>("activation").required<&Forward::u>("u").optional<&Forward::bias>("bias");

    using Slope = FeedForwardActivationBackward;
    Arguments<Slope> slope(m, "FeedForwardActivationBackward", "Arguments of feed_forward_activation_backward");
    add_feed_forward_elements(slope);
    slope.required<&Slope::activation>("activation")
        .required<&Slope::u>("u")
        .required<&Slope::d>("d")
        .optional<&Slope::bias>("bias")
        .required<&Slope::g>("g")
        .required<&Slope::dbias>("dbias");

    using Residual = FeedForwardResidualForward;
    Arguments<Residual> residual(m, "FeedForwardResidualForward", "Arguments of feed_forward_residual_forward");
    add_feed_forward_elements(residual);
    residual.required<&Residual::u>("u")
        .optional<&Residual::bias>("bias")
        .required<&Residual::x>("x")
        .required<&Residual::x_row_stride>("x_row_stride")
        .required<&Residual::scale>("scale");

    using Branch = FeedForwardResidualBackward;
    Arguments<Branch> branch(m, "FeedForwardResidualBackward", "Arguments of feed_forward_residual_backward");
    add_feed_forward_elements(branch);
    branch.required<&Branch::d>("d")
        .required<&Branch::d_row_stride>("d_row_stride")
        .required<&Branch::dbias>("dbias")
        .required<&Branch::scale>("scale");
}

void bind_rows(py::module_& m) {
    using Forward = RowsForward;
    Arguments<Forward>(m, "RowsForward", "Arguments of rows_forward")
        .required<&Forward::element>("element")
        .required<&Forward::rows>("rows")
        .required<&Forward::columns>("columns")
        .required<&Forward::threads>("threads")
        .required<&Forward::x>("x")
        .optional<&Forward::branch>("branch")
        .optional<&Forward::merge>("merge")
        .optional<&Forward::hidden_norm>("hidden_norm")
        .optional<&Forward::up>("up")
        .optional<&Forward::down>("down")
        .optional<&Forward::activation>("activation")
        .optional<&Forward::norm>("norm")
        .optional<&Forward::next>("next")
        .optional<&Forward::out>("out")
        .optional<&Forward::out_row_stride>("out_row_stride")
        .optional<&Forward::eps>("eps");
}

void bind_convert(py::module_& m) {
    Arguments<Convert>(m, "Convert", "Arguments of convert")
        .required<&Convert::element>("element")
        .required<&Convert::to_element>("to_element")
        .required<&Convert::size>("size")
        .required<&Convert::threads>("threads")
        .required<&Convert::from>("from_")
        .required<&Convert::to>("to");
}

// Kernels of inference in their order, with copies of their arguments: one call for all of them.
class Sequence {
   public:
    template <class Args>
    void append(const char* name, const Args& args, void (*Kernels::*kernel)(const Args&)) {
        check(name, args);
        launches_.push_back([args, kernel] { (kernels().*kernel)(args); });
    }
    void run() const {
        for (const auto& launch : launches_) launch();
    }

   private:
    std::vector<std::function<void()>> launches_;
};

void bind_sequence(py::module_& m) {
    py::class_<Sequence> sequence(m, "Sequence", "Kernels in their order: append(args) for each, then run()");
    sequence.def(py::init<>());
#define LCC_APPEND(kernel, Args)                                                                          \
    sequence.def(                                                                                         \
        "append", [](Sequence& self, const Args& args) { self.append(#kernel, args, &Kernels::kernel); }, \
        py::arg("args"), py::pos_only());
    LCC_APPEND(rows_forward, RowsForward)
    LCC_APPEND(relpos_attention_forward, RelposAttentionForward)
    LCC_APPEND(glu_depthwise_conv_forward, GluDepthwiseConvForward)
#undef LCC_APPEND
    sequence.def("run", &Sequence::run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind(py::module_& m) {
    m.def("simd_level", &simd_level, "Instruction set the kernels use on this processor.");
    m.def("simd_levels", &simd_levels, "Those it could use, best first.");
    m.def("set_simd_level", &set_simd_level, "Use another; for tests.");
    m.def("max_threads", &max_threads, "Threads an OpenMP region started now would get.");
    m.def(
        "fingerprint",
        [](uintptr_t parts, int64_t n, bool complete) {
            return fingerprint(reinterpret_cast<const Bytes*>(parts), n, complete);
        },
        "A number that changes with n tensors, given as the address of n pairs (address, bytes) of int64.");
    m.def("bfloat16_gain", &bfloat16_gain,
          "How many times as fast as products of float32 those of bfloat16 are on this processor, measured once.",
          py::call_guard<py::gil_scoped_release>());
    m.def("wake_helpers", &wake_helpers,
          "Wake the threads of the inference kernels, for a launch that is about to come.",
          py::call_guard<py::gil_scoped_release>());
    m.attr("PANEL_COLUMNS") = kPanelColumns;
    m.attr("HIDDEN_COLUMNS") = kHiddenColumns;
    m.attr("TILE_ROWS") = kTileRows;

    bind_parts(m);
    bind_relpos_attention(m);
    bind_glu_depthwise_conv(m);
    bind_residual_layer_norm(m);
    bind_feed_forward(m);
    bind_rows(m);
    bind_convert(m);
#define LCC_BIND(kernel, Args)                           \
    bind_launch<Args>(m, #kernel, [](const Args& args) { \
        check(#kernel, args);                            \
        kernels().kernel(args);                          \
    });
    LCC_KERNELS(LCC_BIND)
#undef LCC_BIND
    bind_sequence(m);
}

}  // namespace lcc::cpu
