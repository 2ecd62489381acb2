//! Text in, text out, as it is generated.
//!
//! ```text
//! cargo run --release --example generate -- models/demo "Shall I compare thee"
//! ```

use std::io::Write;

use trine::engine::{LoadedModel, ModelOptions, SamplingParams, TextEvent};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: generate CHECKPOINT [PROMPT]")?;
    let prompt = arguments.next().unwrap_or_else(|| "Shall I compare thee".into());

    let mut model = LoadedModel::open(path, &ModelOptions::default())?;
    // What the checkpoint's generation_config.json asks for, but for what is set here.
    let params = SamplingParams { max_tokens: Some(50), seed: Some(1), ..model.defaults() };
    let mut out = std::io::stdout();
    for event in model.generate_text(&prompt, &params)? {
        let event = event?;
        write!(out, "{}", event.text())?;
        out.flush()?;
        if let TextEvent::Done { usage, .. } = event {
            writeln!(out)?;
            eprintln!("{} tokens", usage.generated);
        }
    }
    Ok(())
}
