//! The strict fixtures are worth what they catch: each fault planted here, one at a time, must fail
//! one of them, and no fault must fail none.

#[path = "fixture/faulty.rs"]
mod faulty;
mod fixture;

use faulty::{Faulty, OpFault};
use fixture::Fixture;
use trine::checkpoint::{self, Checkpoint};
use trine::error::LoadError;
use trine::model::config::{Family, ModelConfig, NormRole, Projection};
use trine::model::executor::Executor;
use trine::model::weights::WeightSource;
use trine::tensor::{HostTable, SharedBytes};
use trine::ternary::{TernaryRows, TernaryTensor};

faulty::faults! {
    /// What a loader gets wrong.
    LoadFault {
        /// Every scale is turned over.
        ScaleInverted,
        /// Key, value and query share the query's scale.
        SharedQkvScale,
        /// Four neighbouring rows share a byte instead of four far-apart ones.
        RowsNeighbouring,
        /// The first quarter of the rows is in the high bits.
        HighBitsFirst,
        /// −1 and +1 are exchanged.
        SignFlipped,
        /// The codes mean −2, −1, +1, +2 cut to ternary: there is no zero.
        NoZero,
        /// Every gain is one too high.
        GainPlusOne,
        /// The norms before attention and feed-forward are exchanged.
        NormsSwapped,
        /// No sub-norms.
        NoSubNorms,
        /// Key and value projections are exchanged.
        KeyValueSwapped,
        /// Gate and up projections are exchanged.
        GateUpSwapped,
        /// The first two layers are exchanged.
        LayersSwapped,
        /// eps is 1e-5 whatever the file says.
        EpsAlways,
        /// theta is 10,000 whatever the file says.
        ThetaAlways,
        /// The head is the embedding table though the file has its own.
        HeadTied,
        /// Rows of the embedding table are one off.
        EmbeddingShifted,
    }
}

/// A checkpoint with a fault.
struct Spoiled<'a> {
    inner: &'a Checkpoint,
    config: ModelConfig,
    fault: LoadFault,
}

impl<'a> Spoiled<'a> {
    fn new(inner: &'a Checkpoint, fault: LoadFault) -> Self {
        let mut config = inner.config().clone();
        match fault {
            LoadFault::NoSubNorms => config.family = Family::Llama,
            LoadFault::EpsAlways => config.rms_eps = 1e-5,
            LoadFault::ThetaAlways => config.rope_theta = 10_000.0,
            LoadFault::HeadTied => config.tied_head = true,
            _ => {}
        }
        Self { inner, config, fault }
    }

    fn layer(&self, layer: usize) -> usize {
        match (self.fault, layer) {
            (LoadFault::LayersSwapped, 0 | 1) if self.config.layers > 1 => 1 - layer,
            _ => layer,
        }
    }

    fn projection(&self, projection: Projection) -> Projection {
        match (self.fault, projection) {
            (LoadFault::KeyValueSwapped, Projection::Key) => Projection::Value,
            (LoadFault::KeyValueSwapped, Projection::Value) => Projection::Key,
            (LoadFault::GateUpSwapped, Projection::Gate) => Projection::Up,
            (LoadFault::GateUpSwapped, Projection::Up) => Projection::Gate,
            _ => projection,
        }
    }

    fn scale(&self, layer: usize, projection: Projection, own: f32) -> Result<f32, LoadError> {
        let of = |projection| Ok(self.inner.ternary(layer, projection)?.scale());
        match (self.fault, projection) {
            (LoadFault::ScaleInverted, _) => Ok(1.0 / own),
            (LoadFault::SharedQkvScale, Projection::Key | Projection::Value) => {
                of(Projection::Query)
            }
            _ => Ok(own),
        }
    }

    /// Which row of the file a row is read from.
    fn row(&self, row: usize, rows: usize) -> usize {
        let quarter = rows / 4;
        match self.fault {
            LoadFault::RowsNeighbouring if quarter > 0 => row % 4 * quarter + row / 4,
            LoadFault::HighBitsFirst if quarter > 0 => {
                (3 - row / quarter) * quarter + row % quarter
            }
            _ => row,
        }
    }
}

impl WeightSource for Spoiled<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let (layer, projection) = (self.layer(layer), self.projection(projection));
        let source = self.inner.ternary(layer, projection)?;
        let (rows, cols) = (source.rows(), source.cols());
        let mut weights = Vec::with_capacity(rows * cols);
        let mut codes = vec![0; cols];
        for row in 0..rows {
            source.read_codes(self.row(row, rows), &mut codes);
            weights.extend(codes.iter().map(|&code| match self.fault {
                LoadFault::SignFlipped => 1 - code as i8,
                LoadFault::NoZero => {
                    if code < 2 {
                        -1
                    } else {
                        1
                    }
                }
                _ => code as i8 - 1,
            }));
        }
        let scale = self.scale(layer, projection, source.scale())?;
        Ok(Box::new(TernaryTensor::from_weights(rows, cols, scale, &weights).expect("ternary")))
    }

    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        let role = match role {
            NormRole::Attention(l) if self.fault == LoadFault::NormsSwapped => NormRole::Ffn(l),
            NormRole::Ffn(l) if self.fault == LoadFault::NormsSwapped => NormRole::Attention(l),
            NormRole::Attention(l) => NormRole::Attention(self.layer(l)),
            NormRole::AttentionSub(l) => NormRole::AttentionSub(self.layer(l)),
            NormRole::Ffn(l) => NormRole::Ffn(self.layer(l)),
            NormRole::FfnSub(l) => NormRole::FfnSub(self.layer(l)),
            NormRole::Projection(l, p) => NormRole::Projection(self.layer(l), p),
            NormRole::QueryHead(l) => NormRole::QueryHead(self.layer(l)),
            NormRole::KeyHead(l) => NormRole::KeyHead(self.layer(l)),
            NormRole::PostAttention(l) => NormRole::PostAttention(self.layer(l)),
            NormRole::PostFfn(l) => NormRole::PostFfn(self.layer(l)),
            NormRole::Final => NormRole::Final,
        };
        let mut gain = self.inner.norm(role)?;
        if self.fault == LoadFault::GainPlusOne {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        Ok(gain)
    }

    fn embedding(&self) -> Result<HostTable, LoadError> {
        let mut table = self.inner.embedding()?;
        if self.fault == LoadFault::EmbeddingShifted {
            let mut bytes = table.bytes.to_vec();
            bytes.rotate_left(table.cols * table.float.size());
            table.bytes = SharedBytes::new(bytes);
        }
        Ok(table)
    }

    fn head(&self) -> Result<HostTable, LoadError> {
        self.inner.head()
    }
}

/// The fixtures with their checkpoints, read once.
fn fixtures() -> Vec<(Fixture, Checkpoint)> {
    let load = |name: &&str| {
        let fixture = fixture::load(name);
        let checkpoint = checkpoint::open(&fixture.folder).expect(name);
        (fixture, checkpoint)
    };
    fixture::NAMES.iter().map(load).collect()
}

/// The strict case that a pair of faults fails first, if there is one.
fn caught_by(fixtures: &[(Fixture, Checkpoint)], op: OpFault, load: LoadFault) -> Option<String> {
    fixtures.iter().find_map(|(fixture, checkpoint)| {
        let source = Spoiled::new(checkpoint, load);
        let reserve = fixture::reserve();
        let mut executor = Executor::load(Faulty::new(op), &source, reserve, &mut |_, _| {})
            .expect("the fault leaves the shapes alone");
        let failed = fixture.cases.iter().filter(|case| case.strict).find(|case| {
            fixture::run(&mut executor, case)
                .map_or(true, |output| !fixture::failures(case, &output).is_empty())
        });
        failed.map(|case| format!("{} {}", fixture.name, case.name))
    })
}

#[test]
fn without_a_fault_nothing_fails() {
    assert_eq!(caught_by(&fixtures(), OpFault::None, LoadFault::None), None);
}

#[test]
fn every_fault_of_an_op_is_caught() {
    let fixtures = fixtures();
    let missed: Vec<&OpFault> = (OpFault::ALL.iter())
        .filter(|&&fault| caught_by(&fixtures, fault, LoadFault::None).is_none())
        .collect();
    assert!(missed.is_empty(), "no strict case fails for {missed:?}");
}

#[test]
fn every_fault_of_a_loader_is_caught() {
    let fixtures = fixtures();
    let missed: Vec<&LoadFault> = (LoadFault::ALL.iter())
        .filter(|&&fault| caught_by(&fixtures, OpFault::None, fault).is_none())
        .collect();
    assert!(missed.is_empty(), "no strict case fails for {missed:?}");
}
