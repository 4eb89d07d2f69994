//! Panels as one picture: SVG, and the same as PNG.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::panel::Panel;

/// Of one panel.
const WIDTH: u32 = 520;
const HEIGHT: u32 = 380;
/// Of the legend below the panels.
const LEGEND: u32 = 34;
/// Most labels of an x axis.
const MOST_TICKS: usize = 8;
/// Pixels of the PNG per unit of the SVG.
const SCALE: u32 = 1;

const FONT: &str = "sans-serif";
const TEXT: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(225, 225, 225);
const LIMIT: RGBColor = RGBColor(130, 130, 130);
/// Distinct also for those who see few colours (Okabe and Ito); ours is the first.
const COLOURS: [(&str, RGBColor); 7] = [
    ("XCCL", RGBColor(213, 94, 0)),
    ("Open MPI", RGBColor(0, 114, 178)),
    ("MPICH", RGBColor(86, 180, 233)),
    ("PyTorch gloo", RGBColor(0, 158, 115)),
    ("UCX", RGBColor(204, 121, 167)),
    ("UCX, CMA", RGBColor(150, 90, 170)),
    ("iceoryx2", RGBColor(190, 160, 0)),
];

/// Two panels beside each other, and the legend.
fn size(panels: usize) -> (u32, u32) {
    let columns = panels.clamp(1, 2) as u32;
    (columns * WIDTH, panels.div_ceil(2).max(1) as u32 * HEIGHT + LEGEND)
}

pub fn svg(panels: &[Panel], path: &Path) -> Result<()> {
    register()?;
    let backend = SVGBackend::new(path, size(panels.len()));
    draw(panels, backend.into_drawing_area(), 1).with_context(|| format!("drawing {path:?}"))
}

pub fn png(panels: &[Panel], path: &Path) -> Result<()> {
    register()?;
    let (width, height) = size(panels.len());
    let (width, height) = (width * SCALE, height * SCALE);
    let mut pixels = vec![0; 3 * width as usize * height as usize];
    let backend = BitMapBackend::with_buffer(&mut pixels, (width, height));
    draw(panels, backend.into_drawing_area(), SCALE).with_context(|| format!("drawing {path:?}"))?;
    let file = File::create(path).with_context(|| format!("creating {path:?}"))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header().with_context(|| format!("writing {path:?}"))?;
    writer.write_image_data(&pixels).and_then(|()| writer.finish()).with_context(|| format!("writing {path:?}"))
}

/// A font of our own: a bare system has none.
fn register() -> Result<()> {
    plotters::style::register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| anyhow!("the built-in font is damaged"))
}

fn draw<B: DrawingBackend>(panels: &[Panel], area: DrawingArea<B, Shift>, scale: u32) -> Result<()>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE)?;
    let (columns, rows) = (panels.len().clamp(1, 2), panels.len().div_ceil(2).max(1));
    let (diagrams, legend) = area.split_vertically((rows as u32 * HEIGHT * scale) as i32);
    for (panel, area) in panels.iter().zip(diagrams.split_evenly((rows, columns))) {
        draw_panel(panel, &area, scale)?;
    }
    draw_legend(panels, &legend, scale)?;
    area.present()?;
    Ok(())
}

/// One for all panels, below them, where no curve passes.
fn draw_legend<B: DrawingBackend>(panels: &[Panel], area: &DrawingArea<B, Shift>, scale: u32) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (scaled, style) = (|length: i32| length * scale as i32, (FONT, 14 * scale).into_font().color(&TEXT));
    let present = |name: &str| panels.iter().flat_map(|panel| &panel.curves).any(|curve| curve.name == name);
    let mut entries: Vec<(&str, RGBColor)> = COLOURS.into_iter().filter(|(name, _)| present(name)).collect();
    if panels.iter().any(|panel| !panel.limit.is_empty()) {
        entries.push(("limit of the machine", LIMIT));
    }
    let mut x = scaled(20);
    for (name, colour) in entries {
        area.draw(&PathElement::new([(x, scaled(13)), (x + scaled(22), scaled(13))], colour.stroke_width(3 * scale)))?;
        area.draw(&Text::new(name, (x + scaled(28), scaled(6)), style.clone()))?;
        x += scaled(28 + 20) + area.estimate_text_size(name, &style)?.0 as i32;
    }
    Ok(())
}

/// Of an axis: all values, and a little around them.
fn range(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(0.0, f64::max);
    if low > high { (1.0, 10.0) } else { (low / 1.3, high * 1.3) }
}

/// Where the x axis has ticks: at measured values, and not so many that labels overlap.
fn ticks(panel: &Panel) -> Vec<f64> {
    let mut all: Vec<f64> = panel.curves.iter().flat_map(|curve| &curve.points).map(|point| point.0).collect();
    all.sort_by(f64::total_cmp);
    all.dedup();
    let every = all.len().div_ceil(MOST_TICKS).max(1);
    all.into_iter().step_by(every).collect()
}

fn decades(bottom: f64, top: f64) -> Vec<f64> {
    let powers = bottom.log10().ceil() as i32..=top.log10().floor() as i32;
    powers.map(|power| 10f64.powi(power)).collect()
}

fn draw_panel<B: DrawingBackend>(panel: &Panel, area: &DrawingArea<B, Shift>, scale: u32) -> Result<()>
where
    B::ErrorType: 'static,
{
    let font = |size: u32| (FONT, size * scale).into_font().color(&TEXT);
    let points = panel.curves.iter().flat_map(|curve| &curve.points).chain(&panel.limit);
    let (left, right) = range(points.clone().map(|p| p.0));
    let (bottom, top) = range(points.map(|p| p.1));
    let x_axis = (left..right).log_scale().with_key_points(ticks(panel));
    let y_axis = (bottom..top).log_scale().with_key_points(decades(bottom, top));
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, font(17))
        .margin(10 * scale)
        .x_label_area_size(38 * scale)
        .y_label_area_size(58 * scale)
        .build_cartesian_2d(x_axis, y_axis)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .axis_style(TEXT)
        .x_label_formatter(&|x| if panel.in_bytes { bytes(*x) } else { format!("{x:.0}") })
        .y_label_formatter(&|y| time(*y))
        .x_desc(panel.over)
        .label_style(font(13))
        .axis_desc_style(font(14))
        .draw()?;
    let limit = LIMIT.stroke_width(2 * scale);
    chart.draw_series(DashedLineSeries::new(panel.limit.iter().copied(), 5 * scale, 4 * scale, limit))?;
    // Ours last, on top.
    for curve in panel.curves.iter().rev() {
        let ours = curve.name == super::ours::NAME;
        let colour = COLOURS.iter().find(|(name, _)| *name == curve.name).map_or(TEXT, |(_, colour)| *colour);
        let style = colour.stroke_width(if ours { 3 } else { 2 } * scale);
        chart.draw_series(LineSeries::new(curve.points.iter().copied(), style))?;
        let radius = (if ours { 4 } else { 3 } * scale) as i32;
        chart.draw_series(curve.points.iter().map(|&point| Circle::new(point, radius, colour.filled())))?;
    }
    Ok(())
}

fn bytes(x: f64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = units.into_iter().find(|&(unit, _)| x >= unit as f64);
    unit.map_or_else(|| format!("{x:.0} B"), |(unit, name)| format!("{:.0} {name}", x / unit as f64))
}

fn time(us: f64) -> String {
    match us {
        us if us < 0.9995 => format!("{:.0} ns", us * 1e3),
        us if us < 999.5 => format!("{us:.0} us"),
        us => format!("{:.0} ms", us / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::compare::panel::panels;
    use crate::bench::compare::report::tests::sample_report;

    #[test]
    fn both_pictures_are_drawn_and_the_svg_names_every_curve() {
        let dir = tempfile::tempdir().unwrap();
        let panels = panels(&sample_report());
        let (svg_file, png_file) = (dir.path().join("a.svg"), dir.path().join("a.png"));
        svg(&panels, &svg_file).unwrap();
        png(&panels, &png_file).unwrap();
        let text = std::fs::read_to_string(svg_file).unwrap();
        for word in ["XCCL", "Open MPI", "limit of the machine", "bytes", "tokens per rank", "Message, half round trip"]
        {
            assert!(text.contains(word), "{word} is missing");
        }
        let mut reader = png::Decoder::new(std::io::BufReader::new(File::open(png_file).unwrap())).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let ours = COLOURS[0].1;
        let ours = pixels.chunks_exact(3).filter(|p| *p == [ours.0, ours.1, ours.2]).count();
        // The caption's letters: without a font there would be none.
        let (width, _) = size(2);
        let caption = &pixels[..3 * (width * SCALE * 36 * SCALE) as usize];
        let dark = caption.chunks_exact(3).filter(|p| p.iter().all(|&c| c < 100)).count();
        assert!(ours > 500 && dark > 200, "{ours} pixels of our curve, {dark} of the caption");
    }

    #[test]
    fn nothing_to_draw_is_an_empty_picture() {
        let dir = tempfile::tempdir().unwrap();
        svg(&[], &dir.path().join("a.svg")).unwrap();
        png(&[], &dir.path().join("a.png")).unwrap();
    }

    #[test]
    fn labels_are_short() {
        assert_eq!([8.0, 4096.0, 1048576.0].map(bytes), ["8 B", "4 KiB", "1 MiB"]);
        assert_eq!([0.1, 1.0, 100.0, 1000.0].map(time), ["100 ns", "1 us", "100 us", "1 ms"]);
    }
}
