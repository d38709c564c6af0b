//! One line per operator: its name, the first and the last opset whose meaning is implemented, and
//! the function that imports it.

use super::call::{Call, Outputs};
use super::{
    attention, contraction, grid, known, loss, microsoft, ngrams, norm, pointwise, quant,
    recurrent, reduce, resize, sampled, shape, special, spectrum, training, trees,
};
use crate::error::Diagnostic;

/// The newest opset that has been read.
pub const NEWEST: i64 = 27;

/// An operator that Kiln reads.
pub struct Operator {
    /// Name, with its domain where that is not the default one.
    pub name: &'static str,
    /// First opset.
    pub since: i64,
    /// Adds the operator to the graph.
    pub import: fn(&mut Call) -> Outputs,
}

macro_rules! operators {
    ($($name:literal $since:literal => $module:ident::$function:ident;)*) => {
        &[$(Operator { name: $name, since: $since, import: $module::$function },)*]
    };
}

/// All operators.
pub static OPERATORS: &[Operator] = operators! {
    "Abs" 6 => pointwise::abs;
    "Acos" 7 => special::acos;
    "Acosh" 9 => special::acosh;
    "Add" 6 => pointwise::add;
    "AffineGrid" 20 => grid::affine_grid;
    "And" 6 => pointwise::and;
    "ArgMax" 6 => reduce::arg_max;
    "ArgMin" 6 => reduce::arg_min;
    "Asin" 7 => special::asin;
    "Asinh" 9 => special::asinh;
    "Atan" 7 => special::atan;
    "Atanh" 9 => special::atanh;
    "Attention" 23 => attention::attention;
    "AveragePool" 6 => contraction::average_pool;
    "BatchNormalization" 6 => norm::batch_norm;
    "BitCast" 26 => pointwise::bit_cast;
    "BitShift" 11 => special::bit_shift;
    "BitwiseAnd" 18 => pointwise::and;
    "BitwiseNot" 18 => pointwise::not;
    "BitwiseOr" 18 => pointwise::or;
    "BitwiseXor" 18 => pointwise::xor;
    "BlackmanWindow" 17 => spectrum::blackman;
    "Cast" 6 => pointwise::cast;
    "CastLike" 15 => pointwise::cast_like;
    "CausalConvWithState" 27 => contraction::causal_conv;
    "Ceil" 6 => pointwise::ceil;
    "Celu" 12 => pointwise::celu;
    "CenterCropPad" 18 => special::center_crop_pad;
    "Clip" 6 => pointwise::clip;
    "Col2Im" 18 => grid::col2im;
    "Compress" 9 => known::compress;
    "Concat" 4 => shape::concat;
    "Constant" 1 => shape::constant;
    "ConstantOfShape" 9 => shape::constant_of_shape;
    "Conv" 1 => contraction::conv;
    "ConvInteger" 10 => quant::conv_integer;
    "ConvTranspose" 1 => contraction::conv_transpose;
    "Cos" 7 => pointwise::cos;
    "Cosh" 9 => special::cosh;
    "CumProd" 26 => reduce::cum_prod;
    "CumSum" 11 => reduce::cum_sum;
    "DFT" 17 => spectrum::dft;
    "DeformConv" 19 => sampled::deform_conv;
    "DepthToSpace" 1 => shape::depth_to_space;
    "DequantizeLinear" 10 => quant::dequantize;
    "Det" 11 => special::det;
    "Div" 6 => pointwise::div;
    "Dropout" 6 => pointwise::dropout;
    "DynamicQuantizeLinear" 11 => quant::dynamic_quantize;
    "Einsum" 12 => special::einsum;
    "Elu" 6 => pointwise::elu;
    "Equal" 6 => pointwise::equal;
    "Erf" 9 => pointwise::erf;
    "Exp" 6 => pointwise::exp;
    "Expand" 8 => shape::expand;
    "EyeLike" 9 => special::eye_like;
    "Flatten" 1 => shape::flatten;
    "Floor" 6 => pointwise::floor;
    "GRU" 7 => recurrent::gru;
    "Gather" 1 => shape::gather;
    "GatherElements" 11 => shape::gather_elements;
    "GatherND" 11 => shape::gather_nd;
    "Gelu" 20 => pointwise::gelu;
    "Gemm" 6 => contraction::gemm;
    "GlobalAveragePool" 1 => contraction::global_average_pool;
    "GlobalLpPool" 2 => special::global_lp_pool;
    "GlobalMaxPool" 1 => contraction::global_max_pool;
    "Greater" 6 => pointwise::greater;
    "GreaterOrEqual" 12 => pointwise::greater_equal;
    "GridSample" 16 => grid::grid_sample;
    "GroupNormalization" 18 => norm::group_norm;
    "HammingWindow" 17 => spectrum::hamming;
    "HannWindow" 17 => spectrum::hann;
    "HardSigmoid" 6 => pointwise::hard_sigmoid;
    "HardSwish" 14 => pointwise::hard_swish;
    "Hardmax" 1 => reduce::hardmax;
    "Identity" 1 => pointwise::identity;
    "InstanceNormalization" 6 => norm::instance_norm;
    "IsInf" 10 => pointwise::is_inf;
    "IsNaN" 9 => pointwise::is_nan;
    "LRN" 1 => norm::lrn;
    "LSTM" 7 => recurrent::lstm;
    "LayerNormalization" 17 => norm::layer_norm;
    "LeakyRelu" 6 => pointwise::leaky_relu;
    "Less" 6 => pointwise::less;
    "LessOrEqual" 12 => pointwise::less_equal;
    "LinearAttention" 27 => attention::linear_attention;
    "Log" 6 => pointwise::log;
    "LogSoftmax" 1 => reduce::log_softmax;
    "LpNormalization" 1 => norm::lp_norm;
    "LpPool" 2 => contraction::lp_pool;
    "MatMul" 1 => contraction::matmul;
    "MatMulInteger" 10 => quant::matmul_integer;
    "Max" 6 => pointwise::max;
    "MaxPool" 1 => contraction::max_pool;
    "MaxUnpool" 9 => sampled::max_unpool;
    "Mean" 6 => pointwise::mean;
    "MeanVarianceNormalization" 9 => norm::mean_variance_norm;
    "MelWeightMatrix" 17 => spectrum::mel_weight_matrix;
    "Min" 6 => pointwise::min;
    "Mish" 18 => pointwise::mish;
    "Mod" 10 => pointwise::modulo;
    "Mul" 6 => pointwise::mul;
    "Neg" 6 => pointwise::neg;
    "NegativeLogLikelihoodLoss" 12 => loss::negative_log_likelihood;
    "NonMaxSuppression" 10 => known::non_max_suppression;
    "NonZero" 9 => known::non_zero;
    "Not" 1 => pointwise::not;
    "OneHot" 9 => special::one_hot;
    "OptionalGetElement" 15 => pointwise::identity;
    "OptionalHasElement" 15 => pointwise::has_element;
    "Or" 6 => pointwise::or;
    "PRelu" 6 => pointwise::prelu;
    "Pad" 2 => shape::pad;
    "Pow" 6 => pointwise::pow;
    "QLinearConv" 10 => quant::qlinear_conv;
    "QLinearMatMul" 10 => quant::qlinear_matmul;
    "QuantizeLinear" 10 => quant::quantize;
    "RMSNormalization" 23 => norm::rms_norm;
    "RNN" 7 => recurrent::rnn;
    "Range" 11 => shape::range;
    "Reciprocal" 6 => pointwise::reciprocal;
    "ReduceL1" 1 => reduce::l1;
    "ReduceL2" 1 => reduce::l2;
    "ReduceLogSum" 1 => reduce::log_sum;
    "ReduceLogSumExp" 1 => reduce::log_sum_exp;
    "ReduceMax" 1 => reduce::max;
    "ReduceMean" 1 => reduce::mean;
    "ReduceMin" 1 => reduce::min;
    "ReduceProd" 1 => reduce::prod;
    "ReduceSum" 1 => reduce::sum;
    "ReduceSumSquare" 1 => reduce::sum_square;
    "Relu" 6 => pointwise::relu;
    "Reshape" 1 => shape::reshape;
    "Resize" 10 => resize::resize;
    "ReverseSequence" 10 => grid::reverse_sequence;
    "RoiAlign" 10 => sampled::roi_align;
    "RotaryEmbedding" 23 => attention::rotary;
    "Round" 11 => pointwise::round;
    "STFT" 17 => spectrum::stft;
    "Scatter" 9 => shape::scatter_elements;
    "ScatterElements" 11 => shape::scatter_elements;
    "ScatterND" 11 => shape::scatter_nd;
    "Selu" 6 => pointwise::selu;
    "Shape" 1 => shape::shape;
    "Shrink" 9 => special::shrink;
    "Sigmoid" 6 => pointwise::sigmoid;
    "Sign" 9 => pointwise::sign;
    "SimplifiedLayerNormalization" 1 => norm::rms_norm;
    "Sin" 7 => pointwise::sin;
    "Sinh" 9 => special::sinh;
    "Size" 1 => shape::size;
    "Slice" 1 => shape::slice;
    "Softmax" 1 => reduce::softmax;
    "SoftmaxCrossEntropyLoss" 12 => loss::softmax_cross_entropy;
    "Softplus" 1 => pointwise::softplus;
    "Softsign" 1 => pointwise::softsign;
    "SpaceToDepth" 1 => shape::space_to_depth;
    "Split" 2 => shape::split;
    "Sqrt" 6 => pointwise::sqrt;
    "Squeeze" 1 => shape::squeeze;
    "Sub" 6 => pointwise::sub;
    "Sum" 6 => pointwise::sum;
    "Swish" 24 => pointwise::swish;
    "Tan" 7 => special::tan;
    "Tanh" 6 => pointwise::tanh;
    "TensorScatter" 24 => attention::tensor_scatter;
    "TfIdfVectorizer" 9 => ngrams::tf_idf;
    "ThresholdedRelu" 10 => pointwise::thresholded_relu;
    "Tile" 6 => shape::tile;
    "TopK" 1 => special::top_k;
    "Transpose" 1 => shape::transpose;
    "Trilu" 14 => shape::trilu;
    "Unique" 11 => known::unique;
    "Unsqueeze" 1 => shape::unsqueeze;
    "Upsample" 7 => resize::upsample;
    "Where" 9 => pointwise::select;
    "Xor" 6 => pointwise::xor;
    "ai.onnx.ml.ArrayFeatureExtractor" 1 => trees::array_feature_extractor;
    "ai.onnx.ml.Binarizer" 1 => trees::binarizer;
    "ai.onnx.ml.LabelEncoder" 2 => trees::label_encoder;
    "ai.onnx.ml.TreeEnsemble" 5 => trees::tree_ensemble;
    "ai.onnx.preview.training.Adagrad" 1 => training::adagrad;
    "ai.onnx.preview.training.Adam" 1 => training::adam;
    "ai.onnx.preview.training.Momentum" 1 => training::momentum;
    "com.microsoft.BiasGelu" 1 => microsoft::bias_gelu;
    "com.microsoft.FastGelu" 1 => microsoft::fast_gelu;
    "com.microsoft.GroupQueryAttention" 1 => microsoft::grouped_query_attention;
    "com.microsoft.MatMulNBits" 1 => microsoft::matmul_of_bits;
    "com.microsoft.MultiHeadAttention" 1 => microsoft::multi_head_attention;
    "com.microsoft.QuickGelu" 1 => microsoft::quick_gelu;
    "com.microsoft.RotaryEmbedding" 1 => microsoft::rotary;
    "com.microsoft.SkipLayerNormalization" 1 => microsoft::skip_layer_norm;
    "com.microsoft.SkipSimplifiedLayerNormalization" 1 => microsoft::skip_rms_norm;
};

/// The name of an operator with its domain, where that is not the default one.
pub fn full_name(domain: &str, name: &str) -> String {
    if domain.is_empty() { name.to_string() } else { format!("{domain}.{name}") }
}

/// The operator of that name where the opset has it.
pub fn find(domain: &str, name: &str, opset: i64) -> Option<&'static Operator> {
    let full = full_name(domain, name);
    let known = |o: &&Operator| o.name == full && opset >= o.since;
    OPERATORS.iter().find(known).filter(|_| opset <= NEWEST)
}

/// Why there is no such operator.
pub fn unsupported(domain: &str, name: &str, opset: i64) -> Diagnostic {
    let full = full_name(domain, name);
    let help = match OPERATORS.iter().find(|o| o.name == full) {
        Some(o) => format!("Kiln reads it from opset {} to {NEWEST}; convert the model", o.since),
        None => {
            "export without this operator, or fold it away; `kiln ops` lists what is read".into()
        }
    };
    Diagnostic::new("K0109", "an operator that is not supported").op(full, opset).help(help)
}
