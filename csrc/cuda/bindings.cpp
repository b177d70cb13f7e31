#include "cuda/bindings.h"

#include "arguments.h"
#include "cuda/cluster_loop.h"
#include "cuda/glu_depthwise_conv.h"
#include "cuda/relpos_attention.h"

namespace lcc::cuda {
namespace {

template <class S>
void add_glu_depthwise_conv(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::batch>("batch")
        .template required<&S::frames>("frames")
        .template required<&S::channels>("channels")
        .template required<&S::width>("width")
        .template required<&S::x>("x")
        .template required<&S::x_batch_stride>("x_batch_stride")
        .template required<&S::x_frame_stride>("x_frame_stride")
        .template required<&S::weight>("weight")
        .template optional<&S::lengths>("lengths")
        .template optional<&S::scale>("scale")
        .template optional<&S::shift>("shift")
        .template optional<&S::layer_norm>("layer_norm")
        .template optional<&S::eps>("eps")
        .template required<&S::device>("device")
        .template required<&S::stream>("stream");
}

void bind_glu_depthwise_conv(py::module_& m) {
    using Forward = GluDepthwiseConvForward;
    Arguments<Forward> forward(m, "GluDepthwiseConvForward", "Arguments of glu_depthwise_conv_forward");
    add_glu_depthwise_conv(forward);
    forward.optional<&Forward::bias>("bias")
        .optional<&Forward::mean>("mean")
        .optional<&Forward::var>("var")
        .required<&Forward::out>("out")
        .optional<&Forward::y>("y")
        .optional<&Forward::segments>("segments");

    using Backward = GluDepthwiseConvBackward;
    Arguments<Backward> backward(m, "GluDepthwiseConvBackward", "Arguments of glu_depthwise_conv_backward");
    add_glu_depthwise_conv(backward);
    backward.required<&Backward::dout>("dout")
        .required<&Backward::dout_batch_stride>("dout_batch_stride")
        .required<&Backward::dout_frame_stride>("dout_frame_stride")
        .required<&Backward::y>("y")
        .required<&Backward::dx>("dx")
        .required<&Backward::dtaps>("dtaps")
        .required<&Backward::dbias>("dbias")
        .required<&Backward::dshift>("dshift")
        .required<&Backward::dscale>("dscale")
        .required<&Backward::partial>("partial")
        .required<&Backward::slots>("slots")
        .optional<&Backward::rows>("rows");

    bind_launch<Forward>(m, "glu_depthwise_conv_forward", &glu_depthwise_conv_forward);
    bind_launch<Backward>(m, "glu_depthwise_conv_backward", &glu_depthwise_conv_backward);
    m.def("glu_depthwise_conv_slots", &glu_depthwise_conv_slots, py::arg("batch"), py::arg("frames"),
          py::arg("channels"));
}

template <class S>
void add_relpos_attention(Arguments<S>& args) {
    args.template required<&S::element>("element")
        .template required<&S::batch>("batch")
        .template required<&S::frames>("frames")
        .template required<&S::total_frames>("total_frames")
        .template required<&S::heads>("heads")
        .template required<&S::head_dim>("head_dim")
        .template required<&S::q>("q")
        .template required<&S::k>("k")
        .template required<&S::v>("v")
        .template required<&S::pos>("pos")
        .template required<&S::u>("u")
        .template required<&S::v_bias>("v_bias")
        .template optional<&S::lengths>("lengths")
        .template optional<&S::cu_seqlens>("cu_seqlens")
        .template optional<&S::seed>("seed")
        .template required<&S::dropout_p>("dropout_p")
        .template required<&S::device>("device")
        .template required<&S::stream>("stream");
}

void bind_relpos_attention(py::module_& m) {
    Arguments<RelposHeads>(m, "RelposHeads", "Rows of heads by utterance, frame and head")
        .required<&RelposHeads::data>("data")
        .required<&RelposHeads::batch_stride>("batch_stride")
        .required<&RelposHeads::frame_stride>("frame_stride")
        .required<&RelposHeads::head_stride>("head_stride");

    using Forward = RelposAttentionForward;
    Arguments<Forward> forward(m, "RelposAttentionForward", "Arguments of relpos_attention_forward");
    add_relpos_attention(forward);
    forward.required<&Forward::warpgroups>("warpgroups").required<&Forward::out>("out").required<&Forward::lse>("lse");

    using Backward = RelposAttentionBackward;
    Arguments<Backward> backward(m, "RelposAttentionBackward", "Arguments of relpos_attention_backward");
    add_relpos_attention(backward);
    backward.required<&Backward::out>("out")
        .required<&Backward::lse>("lse")
        .required<&Backward::dout>("dout")
        .required<&Backward::dq>("dq")
        .required<&Backward::dk>("dk")
        .required<&Backward::dv>("dv")
        .required<&Backward::dpos>("dpos")
        .required<&Backward::du>("du")
        .required<&Backward::dv_bias>("dv_bias")
        .required<&Backward::scratch>("scratch")
        .required<&Backward::slots>("slots")
        .required<&Backward::parts>("parts");

    bind_launch<Forward>(m, "relpos_attention_forward", &relpos_attention_forward);
    bind_launch<Backward>(m, "relpos_attention_backward", &relpos_attention_backward);
    m.def("relpos_attention_has_warpgroups", &relpos_attention_has_warpgroups, py::arg("device"));
    m.def("relpos_attention_slots", &relpos_attention_slots, py::arg("batch"), py::arg("frames"), py::arg("heads"),
          py::arg("head_dim"));
    m.def("relpos_attention_parts", &relpos_attention_parts, py::arg("slots"), py::arg("frames"), py::arg("heads"));
    m.def("relpos_attention_scratch", &relpos_attention_scratch, py::arg("frames"), py::arg("head_dim"));
}

void bind_cluster_loop(py::module_& m) {
    Arguments<LoopPart>(m, "LoopPart", "A matrix and its bias, or a norm's weight and bias")
        .required<&LoopPart::weight>("weight")
        .required<&LoopPart::bias>("bias");

    Arguments<ClusterLoop>(m, "ClusterLoop", "Arguments of cluster_loop")
        .required<&ClusterLoop::batch>("batch")
        .required<&ClusterLoop::frames>("frames")
        .required<&ClusterLoop::depth>("depth")
        .required<&ClusterLoop::min_depth>("min_depth")
        .required<&ClusterLoop::threshold>("threshold")
        .required<&ClusterLoop::x>("x")
        .required<&ClusterLoop::lengths>("lengths")
        .required<&ClusterLoop::masked>("masked")
        .required<&ClusterLoop::ffn1_norm>("ffn1_norm")
        .required<&ClusterLoop::ffn1_up>("ffn1_up")
        .required<&ClusterLoop::ffn1_down>("ffn1_down")
        .required<&ClusterLoop::attention_norm>("attention_norm")
        .required<&ClusterLoop::qkv>("qkv")
        .required<&ClusterLoop::attention_out>("attention_out")
        .required<&ClusterLoop::pos>("pos")
        .required<&ClusterLoop::u>("u")
        .required<&ClusterLoop::v_bias>("v_bias")
        .required<&ClusterLoop::conv_norm>("conv_norm")
        .required<&ClusterLoop::pointwise1>("pointwise1")
        .required<&ClusterLoop::depthwise>("depthwise")
        .required<&ClusterLoop::pointwise2>("pointwise2")
        .required<&ClusterLoop::width>("width")
        .required<&ClusterLoop::depthwise_norm>("depthwise_norm")
        .required<&ClusterLoop::running_mean>("running_mean")
        .required<&ClusterLoop::running_var>("running_var")
        .required<&ClusterLoop::ffn2_norm>("ffn2_norm")
        .required<&ClusterLoop::ffn2_up>("ffn2_up")
        .required<&ClusterLoop::ffn2_down>("ffn2_down")
        .required<&ClusterLoop::norm>("norm")
        .required<&ClusterLoop::eps>("eps")
        .required<&ClusterLoop::out>("out")
        .required<&ClusterLoop::states>("states")
        .required<&ClusterLoop::exit_depths>("exit_depths")
        .required<&ClusterLoop::device>("device")
        .required<&ClusterLoop::stream>("stream");
    bind_launch<ClusterLoop>(m, "cluster_loop", &cluster_loop);
    m.def("cluster_loop_fits", &cluster_loop_fits, py::arg("device"));
}

}  // namespace

void bind(py::module_& m) {
    bind_glu_depthwise_conv(m);
    bind_relpos_attention(m);
    bind_cluster_loop(m);
}

}  // namespace lcc::cuda
