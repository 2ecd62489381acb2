//! `trine convert`: a checkpoint to files that other engines read.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{ArgAction, Args, ValueEnum};
use trine::checkpoint::adapted::{Adapted, Merged};
use trine::checkpoint::export::{ExportOptions, Format, GgufArch, TableType, export};
use trine::checkpoint::lora::Adapter;
use trine::checkpoint::{self, Checkpoint};
use trine::error::LoadError;

use super::output;
use super::parse::{self, AdapterArg};

/// Write a checkpoint in a format that other engines read
///
/// Ternary weights and their scales come out exactly as they went in. The embedding table and the
/// output head keep their type unless --head names another. OUT appears when it is whole: until then
/// it has another name in the same folder, and is removed if anything fails or on Ctrl-C.
#[derive(Args)]
#[command(after_help = "\
Types:
  i2_s   GGUF for bitnet.cpp, and ik_llama.cpp's quantizer: 2 bits a weight
  tq2_0  GGUF for llama.cpp: 2.06 bits a weight
  tq1_0  GGUF for llama.cpp: 1.69 bits a weight
  hf     folder for transformers: 2 bits a weight

Examples:
  trine convert models/bitnet-b1.58-2B-4T 2b4t.gguf --type i2_s --head q6_k
  trine convert models/demo demo-hf --type hf")]
pub(crate) struct Convert {
    /// Checkpoint: a folder as Hugging Face writes it, or a weight file
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// File to write; a folder for --type hf
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// What to write
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    format: Type,
    /// Type of the embedding table and the output head [default: what they have]
    #[arg(long, value_name = "TYPE", value_enum)]
    head: Option<Head>,
    /// Architecture that a GGUF file of the BitNet family names [default: the one whose engines
    /// compute the model's activation]
    #[arg(long, value_name = "ARCH", value_enum)]
    arch: Option<Arch>,
    /// LoRA adapter to add to the master weights of IN before they are made ternary; may be repeated
    ///
    /// A folder as PEFT saves it, applied SCALE times. A model whose weights are ternary already has
    /// no room for it: --lora of the other commands applies it when such a model runs.
    #[arg(long, value_name = "PATH[:SCALE]", value_parser = parse::adapter)]
    #[arg(action = ArgAction::Append)]
    merge: Vec<AdapterArg>,
    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Type {
    #[value(name = "i2_s")]
    I2S,
    #[value(name = "tq2_0")]
    Tq2,
    #[value(name = "tq1_0")]
    Tq1,
    Hf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Head {
    F16,
    Bf16,
    F32,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q6_k")]
    Q6K,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Arch {
    Bitnet,
    #[value(name = "bitnet-b1.58")]
    BitnetB158,
}

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

impl Convert {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let checkpoint = checkpoint::open(&self.input)?;
        let path = &self.output;
        ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed))?;
        let merged = self.merged(&checkpoint)?;
        let mut source = checkpoint.export_source();
        if let Some(merged) = &merged {
            source.weights = merged;
        }
        let bar = output::bar("converting");
        let exported = export(&source, path, &self.options(), &mut |done, total| {
            output::advance(&bar, done as usize, total as usize);
            !STOP.load(Ordering::Relaxed)
        });
        bar.finish_and_clear();
        let exported = exported?;
        for note in &exported.notes {
            output::note(format_args!("note: {note}"));
        }
        output::note(format_args!(
            "wrote {}: {} tensors, {}",
            path.display(),
            exported.tensors,
            output::bytes(exported.bytes)
        ));
        Ok(())
    }

    /// The model with its adapters in its weights, where there are any.
    fn merged<'c>(
        &self,
        checkpoint: &'c Checkpoint,
    ) -> Result<Option<Merged<&'c Checkpoint>>, LoadError> {
        if self.merge.is_empty() {
            return Ok(None);
        }
        let mut adapted = Adapted::new(checkpoint);
        for AdapterArg { path, scale } in &self.merge {
            adapted.add(Adapter::open(path, *scale)?)?;
        }
        Merged::new(adapted).map(Some)
    }

    fn options(&self) -> ExportOptions {
        ExportOptions {
            tables: self.head.map(|head| match head {
                Head::F16 => TableType::F16,
                Head::Bf16 => TableType::Bf16,
                Head::F32 => TableType::F32,
                Head::Q8_0 => TableType::Q8_0,
                Head::Q6K => TableType::Q6K,
            }),
            arch: self.arch.map(|arch| match arch {
                Arch::Bitnet => GgufArch::BitNet,
                Arch::BitnetB158 => GgufArch::BitNetB158,
            }),
            overwrite: self.force,
            ..ExportOptions::new(match self.format {
                Type::I2S => Format::I2S,
                Type::Tq2 => Format::Tq2,
                Type::Tq1 => Format::Tq1,
                Type::Hf => Format::Hf,
            })
        }
    }
}
