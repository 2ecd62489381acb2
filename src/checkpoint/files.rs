//! A checkpoint as a set of named files: a folder, or bytes that are already in memory.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::foreign;
use crate::error::LoadError;
use crate::tensor::SharedBytes;

/// The most bytes that a JSON or template file may have. The largest published ones (indices of
/// models with tens of thousands of tensors) are below 10 MiB.
pub(crate) const TEXT_LIMIT: u64 = 16 << 20;

/// Where the files of a checkpoint are. Everything that reads a checkpoint goes through this, so a
/// model embedded in a program is read by the code that reads a folder.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Files {
    /// A folder; its files are memory-mapped or read as they are needed.
    Folder(PathBuf),
    /// Named files in memory.
    Memory {
        /// Stands for the folder in messages.
        label: PathBuf,
        /// Names and contents.
        files: Vec<(String, SharedBytes)>,
    },
}

impl Files {
    /// The path that messages call the set of files by.
    pub(crate) fn location(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder,
            Self::Memory { label, .. } => label,
        }
    }

    /// The path that messages call a file by.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.location().join(name)
    }

    /// Whether there is something of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            // A link that leads nowhere is something, and an error when it is opened.
            Self::Folder(folder) => fs::symlink_metadata(folder.join(name)).is_ok(),
            Self::Memory { files, .. } => files.iter().any(|(file, _)| file == name),
        }
    }

    /// The names of files that end in `end`, sorted.
    pub(crate) fn names_ending(&self, end: &str) -> Result<Vec<String>, LoadError> {
        let mut names: Vec<String> = match self {
            Self::Folder(folder) => {
                let failed = |e| LoadError::read(folder, e);
                let entries = fs::read_dir(folder).map_err(failed)?;
                let names = entries.map(|entry| Ok(entry.map_err(failed)?.file_name()));
                let names: Vec<_> = names.collect::<Result<_, LoadError>>()?;
                names.into_iter().filter_map(|name| name.into_string().ok()).collect()
            }
            Self::Memory { files, .. } => files.iter().map(|(name, _)| name.clone()).collect(),
        };
        names.retain(|name| name.ends_with(end));
        names.sort_unstable();
        Ok(names)
    }

    /// All bytes of a file, memory-mapped if it is one of a folder; `None` if there is no such file.
    pub(crate) fn map(&self, name: &str) -> Result<Option<SharedBytes>, LoadError> {
        match self {
            Self::Folder(_) => {
                let path = self.path(name);
                let Some(file) = open_regular(&path)? else { return Ok(None) };
                // SAFETY: the mapping is private and read-only. That nobody shortens or rewrites the
                // file while it is mapped cannot be enforced; as for every reader that maps model
                // files, doing so is documented as a fault of the user (`checkpoint::open`).
                let map = unsafe { Mmap::map(&file) }.map_err(|e| LoadError::read(&path, e))?;
                Ok(Some(SharedBytes::new(map)))
            }
            Self::Memory { files, .. } => {
                Ok(files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.clone()))
            }
        }
    }

    /// A file of UTF-8 text, at most [`TEXT_LIMIT`] bytes; `None` if there is no such file.
    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, LoadError> {
        let path = self.path(name);
        let bytes = match self {
            Self::Folder(_) => {
                let Some(file) = open_regular(&path)? else { return Ok(None) };
                let mut bytes = Vec::new();
                file.take(TEXT_LIMIT + 1)
                    .read_to_end(&mut bytes)
                    .map_err(|e| LoadError::read(&path, e))?;
                bytes
            }
            Self::Memory { .. } => {
                let Some(bytes) = self.map(name)? else { return Ok(None) };
                bytes[..bytes.len().min(TEXT_LIMIT as usize + 1)].to_vec()
            }
        };
        if bytes.len() as u64 > TEXT_LIMIT {
            return Err(LoadError::invalid(
                &path,
                "size",
                format!("at most {TEXT_LIMIT} bytes of text"),
                "more",
            ));
        }
        String::from_utf8(bytes).map(Some).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            let found = match foreign::name(e.as_bytes()) {
                Some(name) => name.to_owned(),
                None => format!("byte 0x{:02x} at offset {at}", e.as_bytes()[at]),
            };
            LoadError::invalid(&path, "encoding", "UTF-8 text", found)
        })
    }
}

/// The error of a file that must be there and is not.
pub(crate) fn missing(path: &Path) -> LoadError {
    LoadError::read(path, std::io::Error::new(ErrorKind::NotFound, "there is no such file"))
}

/// The first bytes of a file, which must be one and be there.
pub(crate) fn head(path: &Path) -> Result<Vec<u8>, LoadError> {
    let Some(file) = open_regular(path)? else { return Err(missing(path)) };
    let mut bytes = Vec::new();
    let most = foreign::HEAD as u64;
    file.take(most).read_to_end(&mut bytes).map_err(|e| LoadError::read(path, e))?;
    Ok(bytes)
}

/// The error of a path that leads to nothing, or to nothing that may be looked at.
pub(crate) fn unreachable_file(path: &Path, error: std::io::Error) -> LoadError {
    match fs::read_link(path) {
        Ok(target) if error.kind() == ErrorKind::NotFound => {
            let found = format!("a link to {}, which is not there", target.display());
            LoadError::invalid(path, "kind", "a file", found)
        }
        _ => LoadError::read(path, error),
    }
}

/// Opens a file; `None` if there is none. A folder, a pipe or a device is refused before it is
/// opened, which could block.
fn open_regular(path: &Path) -> Result<Option<File>, LoadError> {
    let kind = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Ok(None);
        }
        Err(e) => return Err(unreachable_file(path, e)),
    };
    if !kind.is_file() {
        let found = if kind.is_dir() { "a folder" } else { "a pipe, socket or device" };
        return Err(LoadError::invalid(path, "kind", "a file", found));
    }
    File::open(path).map(Some).map_err(|e| LoadError::read(path, e))
}
