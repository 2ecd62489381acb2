//! The place of an export: written beside it under another name, and renamed when it is whole.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::ExportError;

/// What has this name already.
fn occupied(path: &Path) -> Option<fs::Metadata> {
    // A link that leads nowhere is something, too.
    fs::symlink_metadata(path).ok()
}

fn exists(path: &Path) -> ExportError {
    ExportError::Exists { path: path.to_owned() }
}

/// The folder that a path is in, which must be there.
fn parent(path: &Path) -> Result<&Path, ExportError> {
    let failed = |kind, reason: String| Err(write(path)(std::io::Error::new(kind, reason)));
    if path.file_name().is_none() {
        return failed(ErrorKind::InvalidFilename, "it does not end in a name".into());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    if parent.is_dir() {
        return Ok(parent);
    }
    failed(ErrorKind::NotFound, format!("there is no folder {}", parent.display()))
}

/// Starts the names of what is not whole yet.
const PREFIX: &str = ".trine-convert-";

/// A file in the making; dropped before [`keep`](Self::keep), it is removed.
pub(super) struct NewFile {
    path: PathBuf,
    overwrite: bool,
    pub(super) file: tempfile::NamedTempFile,
}

impl NewFile {
    pub(super) fn create(path: &Path, overwrite: bool) -> Result<Self, ExportError> {
        let parent = parent(path)?;
        if let Some(there) = occupied(path) {
            if there.is_dir() {
                return Err(ExportError::Kind { path: path.to_owned(), expected: "a file" });
            }
            if !overwrite {
                return Err(exists(path));
            }
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        // Else only its owner could read it.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(parent).map_err(write(path))?;
        Ok(Self { path: path.to_owned(), overwrite, file })
    }

    /// Brings the bytes to the disk and gives the file its name.
    pub(super) fn keep(self) -> Result<(), ExportError> {
        let Self { path, overwrite, file } = self;
        file.as_file().sync_all().map_err(write(&path))?;
        let kept = if overwrite { file.persist(&path) } else { file.persist_noclobber(&path) };
        match kept {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Err(exists(&path)),
            Err(error) => Err(write(&path)(error.error)),
        }
    }
}

/// A folder in the making; dropped before [`keep`](Self::keep), it is removed.
pub(super) struct NewFolder {
    path: PathBuf,
    overwrite: bool,
    folder: tempfile::TempDir,
}

impl NewFolder {
    pub(super) fn create(path: &Path, overwrite: bool) -> Result<Self, ExportError> {
        let parent = parent(path)?;
        check_folder(path, overwrite)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let folder = builder.tempdir_in(parent).map_err(write(path))?;
        Ok(Self { path: path.to_owned(), overwrite, folder })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Gives the folder its name. One that it replaces is there until then, and gone after.
    pub(super) fn keep(self) -> Result<(), ExportError> {
        let Self { path, overwrite, folder } = self;
        check_folder(&path, overwrite)?;
        let failed = write(&path);
        if occupied(&path).is_none() {
            return fs::rename(folder.keep(), &path).map_err(failed);
        }
        let old = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent(&path)?);
        let old = old.map_err(write(&path))?;
        let aside = old.path().join("old");
        fs::rename(&path, &aside).map_err(write(&path))?;
        if let Err(error) = fs::rename(folder.path(), &path) {
            // Nothing is lost: the old folder gets its name back, or stays where the error says.
            if fs::rename(&aside, &path).is_err() {
                let kept = old.keep().join("old");
                return Err(write(&kept)(error));
            }
            return Err(failed(error));
        }
        let _ = folder.keep();
        Ok(())
    }
}

/// Whether a folder may be written there: nothing is there, or an empty folder, or, if it may be
/// replaced, a checkpoint and no other file.
fn check_folder(path: &Path, overwrite: bool) -> Result<(), ExportError> {
    let Some(there) = occupied(path) else { return Ok(()) };
    if !there.is_dir() {
        let expected = "a folder, since --type hf writes one";
        return Err(ExportError::Kind { path: path.to_owned(), expected });
    }
    for entry in fs::read_dir(path).map_err(write(path))? {
        let entry = entry.map_err(write(path))?;
        if !overwrite {
            return Err(exists(path));
        }
        let name = entry.file_name();
        if !is_of_checkpoint(&name.to_string_lossy()) && !is_module(&entry.path()) {
            return Err(ExportError::Foreign { path: path.to_owned(), file: entry.path() });
        }
    }
    Ok(())
}

/// Whether this is the folder of a module of sentence-transformers: a number and a class, and nothing in
/// it but a config.
fn is_module(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let numbered = name.split_once('_').is_some_and(|(number, class)| {
        !number.is_empty()
            && number.bytes().all(|b| b.is_ascii_digit())
            && class.bytes().all(|b| b.is_ascii_alphanumeric())
    });
    let only_config = |mut entries: fs::ReadDir| {
        entries.all(|entry| entry.is_ok_and(|e| e.file_name() == "config.json"))
    };
    numbered && fs::read_dir(path).is_ok_and(only_config)
}

/// Whether a checkpoint's folder has files of this name.
fn is_of_checkpoint(name: &str) -> bool {
    super::hf_texts::COMPANIONS.contains(&name)
        || ["config.json", "model.safetensors.index.json"].contains(&name)
        || ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
            .contains(&name)
        || name.starts_with("model") && name.ends_with(".safetensors")
}

/// The error of a write that failed.
pub(super) fn write(path: &Path) -> impl Fn(std::io::Error) -> ExportError + use<> {
    let file = path.to_owned();
    move |source| ExportError::Write { file: file.clone(), source }
}
