//! Exponential, normal distribution and logistic function, without branches, so that a loop over them becomes vector instructions. Rounded the
//! same on every machine: a product and a sum are fused where `mul_add` says so, and nowhere else.
//!
//! The polynomials are Chebyshev fits, computed with 40 digits, of what stands beside them.

use std::f32::consts::{FRAC_1_SQRT_2, LN_2, LOG2_E};

/// Adding 1.5 · 2^23 rounds a small f32 to an integer, which then stands in the lowest bits.
const ROUNDER: f32 = 12_582_912.0;
/// What the f32 next to ln 2 leaves over.
const LN_2_REST: f32 = -1.904_654_3e-9;
/// Below it e^x is subnormal or nothing.
const LEAST_EXPONENT: f32 = -87.0;
/// 2 √(2/π).
const TWICE_ROOT_2_OVER_PI: f32 = 1.595_769;
/// Of the cube, in GELU's approximation.
const CUBIC: f32 = 0.044_715;
/// 1 / √(2π).
const NORMAL_DENSITY_AT_0: f32 = 0.398_942_3;

/// `e^x` for x up to 88, within two units in the last place; 0 for x below -87. NaN stays NaN.
///
/// `x = n ln 2 + r` with a whole n, and `e^r = 1 + r + r² p(r)`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = n.mul_add(-LN_2_REST, n.mul_add(-LN_2, x));
    let p = polynomial(r, [0.001_392_692_7, 0.008_363_774, 0.041_666_55, 0.166_665_74, 0.5]);
    let power = (p * r).mul_add(r, r) + 1.0;
    let two_to_n = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LEAST_EXPONENT { 0.0 } else { power * two_to_n }
}

/// The distribution function Φ of a standard normal variable, within 10^-7. NaN stays NaN.
///
/// With `u = x / √2` and `t = |u|`: near 0, `Φ = (1 + erf u) / 2` and `erf u = u + u p(u²)`; farther out, the tail
/// `(1 - erf t) / 2` is `e^(-t - t q(t)) / 2`, and from t = 4 on nothing.
#[inline(always)]
fn distribution(x: f32) -> f32 {
    let u = x * FRAC_1_SQRT_2;
    let near = [8.334_719e-5, -8.134_709e-4, 5.200_369e-3, -2.685_915_1e-2, 0.112_836_92, -0.376_126_34, 0.128_379_17];
    let near = 0.5f32.mul_add(polynomial(u * u, near).mul_add(u, u), 0.5);
    let t = u.abs();
    let far = [
        -1.011_845_2e-6,
        3.376_522_5e-5,
        -4.940_896e-4,
        4.284_392_4e-3,
        -2.509_343_5e-2,
        0.107_792_23,
        0.634_194_74,
        0.128_888_77,
    ];
    let tail = if t > 4.0 { 0.0 } else { 0.5 * exp(-polynomial(t, far).mul_add(t, t)) };
    let far = if x < 0.0 { tail } else { 1.0 - tail };
    if t < 0.93 { near } else { far }
}

/// `x Φ(x)` and its derivative `Φ(x) + x φ(x)`: the Gaussian error linear unit (Hendrycks and Gimpel, arXiv:1606.08415),
/// with the distribution function Φ and density φ of a standard normal variable.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> (f32, f32) {
    let distribution = distribution(x);
    let density = NORMAL_DENSITY_AT_0 * exp(-0.5 * x * x);
    (x * distribution, x.mul_add(density, distribution))
}

/// `x σ(2u)` and its derivative, with the logistic function σ and `u = √(2/π) (x + 0.044715 x³)`: the unit's approximation
/// by a tangent, `(1 + tanh u) / 2` being σ(2u).
#[inline(always)]
pub(crate) fn gelu_by_tanh(x: f32) -> (f32, f32) {
    // From 100 on σ is 0 or 1 as it is, and the square's own square stays finite.
    let square = (x * x).min(1e4);
    let (distribution, slope) = logistic_and_slope(TWICE_ROOT_2_OVER_PI * x * square.mul_add(CUBIC, 1.0));
    let density = slope * (TWICE_ROOT_2_OVER_PI * square.mul_add(3.0 * CUBIC, 1.0));
    (x * distribution, x.mul_add(density, distribution))
}

/// `1 / (1 + e^-x)`, within three units in the last place. NaN stays NaN.
#[inline(always)]
pub(crate) fn logistic(x: f32) -> f32 {
    logistic_and_slope(x).0
}

/// The logistic function σ, and its derivative `σ (1 - σ)`.
#[inline(always)]
fn logistic_and_slope(x: f32) -> (f32, f32) {
    let power = exp(-x.abs());
    let larger = 1.0 / (1.0 + power);
    (if x < 0.0 { power * larger } else { larger }, power * larger * larger)
}

/// Horner's scheme, highest power first.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[0];
    for coefficient in &coefficients[1..] {
        value = value.mul_add(x, *coefficient);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest distance between `found` and `exact` over `range`, in units of `exact`'s last place as f32.
    fn worst(range: std::ops::Range<f32>, found: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        let count = 400_000;
        let width = (range.end - range.start) / count as f32;
        let distance = |i| {
            let x = range.start + i as f32 * width;
            let exact = exact(f64::from(x));
            let last_place = (exact.abs() as f32).next_up() - exact.abs() as f32;
            (f64::from(found(x)) - exact).abs() / f64::from(last_place)
        };
        (0..count).map(distance).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_accurate_to_a_few_units_in_the_last_place() {
        let near_one = worst(-1.0..1.0, exp, libm::exp);
        let wide = worst(-86.9..88.0, exp, libm::exp);
        assert!(near_one < 2.0 && wide < 2.0, "exp: {near_one}, {wide}");
        let logistic = worst(-80.0..80.0, logistic, |x| 1.0 / (1.0 + libm::exp(-x)));
        assert!(logistic < 3.0, "logistic: {logistic}");
    }

    #[test]
    fn ends_are_what_they_should_be() {
        assert_eq!((exp(0.0), exp(-1e30), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert_eq!((distribution(9.0), distribution(f32::NEG_INFINITY), distribution(0.0)), (1.0, 0.0, 0.5));
        assert!(exp(f32::NAN).is_nan() && distribution(f32::NAN).is_nan() && logistic(f32::NAN).is_nan());
        for gelu in [gelu, gelu_by_tanh] {
            assert_eq!((gelu(50.0), gelu(-50.0), gelu(0.0)), ((50.0, 1.0), (0.0, 0.0), (0.0, 0.5)));
            assert_eq!((gelu(1e30), gelu(-1e30)), ((1e30, 1.0), (0.0, 0.0)));
            assert!(gelu(f32::NAN).0.is_nan() && gelu(f32::NAN).1.is_nan());
        }
    }

    #[test]
    fn gelu_is_accurate_and_so_is_its_derivative() {
        for i in -8000..8000 {
            let x = f64::from(i as f32 / 1000.0);
            let distribution = 0.5 * libm::erfc(-x / 2f64.sqrt());
            let density = libm::exp(-0.5 * x * x) / (2.0 * std::f64::consts::PI).sqrt();
            let (value, slope) = gelu(x as f32);
            assert!((f64::from(value) - x * distribution).abs() < 1.2e-7 * x.abs().max(0.1), "{x}: {value}");
            assert!((f64::from(slope) - (distribution + x * density)).abs() < 2.5e-7, "{x}: {slope}");

            let (root, cubic) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044715);
            let tanh = libm::tanh(root * (x + cubic * x.powi(3)));
            let inner = root * (1.0 + 3.0 * cubic * x * x);
            let (value, slope) = gelu_by_tanh(x as f32);
            let expected = 0.5 * x * (1.0 + tanh);
            assert!((f64::from(value) - expected).abs() < 2.5e-7 * x.abs().max(0.1), "{x}: {value}");
            let expected = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner;
            assert!((f64::from(slope) - expected).abs() < 1e-6, "{x}: {slope}");
        }
    }
}
