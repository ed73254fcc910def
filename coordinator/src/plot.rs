//! `loss.svg`: training and validation loss over steps.

use std::path::Path;

use plotters::prelude::*;

use crate::metrics::Line;

/// Share of the running mean that a new loss replaces.
const SMOOTHING: f64 = 0.05;
/// Most points drawn of a curve.
const MAX_POINTS: usize = 2_000;

/// Draws the losses in `lines` to `path`. Does nothing before there are two points.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn loss_curve(path: &Path, title: &str, lines: &[Line]) -> anyhow::Result<()> {
    let steps = lines.iter().filter_map(|line| match line {
        Line::Step(line) => Some((line.step as f64, line.loss)),
        Line::Validation(_) => None,
    });
    let training: Vec<(f64, f64)> = steps.filter(|point| point.1.is_finite()).collect();
    let validations = lines.iter().filter_map(|line| match line {
        Line::Validation(line) => Some((line.step as f64, line.val_loss)),
        Line::Step(_) => None,
    });
    let validation: Vec<(f64, f64)> = validations.filter(|point| point.1.is_finite()).collect();
    let all = || training.iter().chain(&validation);
    if all().count() < 2 {
        return Ok(());
    }
    let (mut low, mut high) =
        all().fold((f64::MAX, f64::MIN), |(low, high), point| (low.min(point.1), high.max(point.1)));
    let margin = ((high - low) * 0.05).max(1e-6);
    (low, high) = (low - margin, high + margin);
    let last = all().fold(1.0, |last: f64, point| last.max(point.0));

    let root = SVGBackend::new(path, (900, 500)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last, low..high)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_desc("loss")
        .light_line_style(WHITE)
        .draw()?;

    let (blue, orange) = (RGBColor(31, 119, 180), RGBColor(255, 127, 14));
    chart.draw_series(LineSeries::new(thin(&training), blue.mix(0.25)))?;
    let swatch = |style: ShapeStyle| move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], style);
    let line = blue.stroke_width(2);
    chart.draw_series(LineSeries::new(thin(&smooth(&training)), line))?.label("training").legend(swatch(line));
    let line = orange.stroke_width(2);
    chart.draw_series(LineSeries::new(validation, line).point_size(3))?.label("validation").legend(swatch(line));
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).draw()?;
    root.present()?;
    Ok(())
}

/// The exponential running mean.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut mean = None;
    let smoothed = points.iter().map(|&(step, loss)| {
        let new = mean.map_or(loss, |mean: f64| mean + SMOOTHING * (loss - mean));
        mean = Some(new);
        (step, new)
    });
    smoothed.collect()
}

/// Every n-th point and the last, so that a long run's file stays small.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(MAX_POINTS).max(1);
    let mut thinned: Vec<_> = points.iter().copied().step_by(every).collect();
    thinned.extend(points.last().filter(|last| thinned.last() != Some(last)).copied());
    thinned
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::ValidationLine;

    #[test]
    fn a_curve_is_drawn_and_a_single_point_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        let validation =
            |step, val_loss| Line::Validation(ValidationLine { step, val_loss, val_bits_per_byte: None, pairs: None });
        loss_curve(&path, "run", &[validation(0, 4.0)]).unwrap();
        assert!(!path.exists());
        loss_curve(&path, "run", &[validation(0, 4.0), validation(10, f64::NAN), validation(20, 2.0)]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("validation") && svg.contains("polyline"));
    }

    #[test]
    fn thinning_keeps_both_ends() {
        let points: Vec<(f64, f64)> = (0..10_001).map(|i| (f64::from(i), 0.0)).collect();
        let thinned = thin(&points);
        assert!(thinned.len() <= MAX_POINTS + 1);
        assert_eq!((thinned[0].0, thinned[thinned.len() - 1].0), (0.0, 10_000.0));
    }
}
